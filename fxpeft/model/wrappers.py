"""What others put around a model or its blocks (compile, DDP, FSDP1, accelerate): seen through, in one place.

Names, plans, files and messages are those of the model without its wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fxpeft.passes.base import submodule as own_child
from fxpeft.passes.torch_private import INNER as INNER

# wrappers that call it "module", which may be anybody's child: package and class
MODULE = frozenset(
    {
        ("torch", "DistributedDataParallel"), ("torch", "DataParallel"), ("torch", "AveragedModel"),
        ("deepspeed", "DeepSpeedEngine"),
    }
)  # fmt: skip
_HOLDERS = frozenset({*INNER, "module"})


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, however they are nested: ``torch.compile``'s, DDP, FSDP1, activation checkpoints.

    What accelerate's ``prepare`` returns is one of these, or the model itself with another ``forward``.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    children: dict[str, nn.Module | None] = vars(model).get("_modules", {})
    if children.keys().isdisjoint(_HOLDERS):
        return None
    for name in INNER:
        if isinstance(inner := children.get(name), nn.Module):
            return inner
    inner = children.get("module")
    if isinstance(inner, nn.Module) and any(
        (cls.__module__.partition(".")[0], cls.__name__) in MODULE for cls in type(model).__mro__
    ):
        return inner
    return None


def faces(model: nn.Module) -> list[nn.Module]:
    """A model and what it was made of by regional compilation, accelerate's: they share blocks and attributes."""
    found = [model]
    while isinstance(whole := vars(found[-1]).get("_orig_mod"), nn.Module):
        found.append(unwrap(whole))
    return found


def submodule(model: nn.Module, name: str) -> nn.Module:
    """``model.get_submodule(name)`` by the name without wrappers; what it finds is none either."""
    found = unwrap(model)
    for atom in name.split(".") if name else ():
        found = unwrap(own_child(found, atom))
    return found


def plain_name(name: str) -> str:
    """A dotted name without the parts that wrappers add to it."""
    return ".".join(atom for atom in name.split(".") if atom not in INNER)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as if nothing in it were wrapped."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if remove_duplicate and module in seen:
            return
        seen.add(module)
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(f"{name}.{key}" if name else key, child)

    yield from walk("", model)
