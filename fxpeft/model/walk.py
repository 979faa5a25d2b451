"""The modules and tensors of a base model, whatever fxpeft put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from accelerate.utils import align_module_device
from torch import Tensor, nn

from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.base import join
from fxpeft.passes.live import Container
from fxpeft.passes.live.parameters import parametrized


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` of the base model: what fxpeft put into it is left out, and wrappers are seen through."""
    stack: list[tuple[str, nn.Module]] = [("", unwrap(model))]
    seen: set[nn.Module] = set()
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        children = [(join(name, k), unwrap(m)) for k, m in module.named_children() if not isinstance(m, Container)]
        stack.extend(reversed(children))


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` of the base module, what fxpeft put into it left out."""
    found: dict[str, Tensor] = {}
    for name, part in base_modules(module):
        transient = part._non_persistent_buffers_set
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and key not in transient:
                found[join(name, key)] = tensor
    return found


def base_values(module: nn.Module) -> dict[str, Tensor]:
    """:func:`base_state` with real values: what accelerate has offloaded is fetched, one module at a time.

    What FSDP2 has parted is gathered, by all processes.
    """
    found = {key: full_tensor(tensor) for key, tensor in base_state(module).items()}
    if any(tensor.is_meta for tensor in found.values()):
        for name, part in base_modules(module):
            with align_module_device(part):
                for key, tensor in (*part._parameters.items(), *part._buffers.items()):
                    if tensor is not None and join(name, key) in found:
                        found[join(name, key)] = tensor.detach().clone()
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor as it is; one that FSDP2 has parted (a ``DTensor``) is gathered, by all processes."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def base_value(model: nn.Module, path: str) -> Tensor:
    """One parameter of the base, fetched as by :func:`base_values`."""
    owner, _, leaf = path.rpartition(".")
    return base_values(submodule(model, owner))[leaf]


def site_module(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """A site's module and, where the site is a parameter of it, the parameter's name there, else ``""``."""
    owner, _, leaf = site.rpartition(".")
    if leaf:
        module = submodule(model, owner)
        if leaf in module._parameters or leaf in parametrized(module):
            return module, leaf
    return submodule(model, site), ""


def embedding_layer(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """A model's own embeddings, or ``None``: it has none, or several of which none is its own, as CLIP."""
    try:
        layer: nn.Module | None = getattr(model, f"get_{side}_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return layer


def output_head(model: nn.Module) -> nn.Module | None:
    """A model's output embeddings without wrappers, or ``None``."""
    layer = embedding_layer(unwrap(model), "output")
    return None if layer is None else unwrap(layer)
