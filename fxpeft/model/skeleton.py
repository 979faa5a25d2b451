"""A model in outline: plain torch modules at the names of a program's targets, so that all that
reads a model (plans, checkpoints, lowering, slots) works where there is only a graph or a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.passes.targets.kinds import Conv, Embedding, Kind, Linear


@dataclass(frozen=True)
class Outline:
    """One target.

    Args:
        weight: ``[out, in, ...]``; ``None`` stands for one that nothing reads, of ``dtype`` on ``device``.
        bias: ``[out]`` or ``None``. biased: there is one that nothing reads.
    """

    kind: Kind
    weight: Tensor | None = None
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    biased: bool = False


class Skeleton(nn.Module):
    """The root of a model in outline."""


def skeleton(outlines: Mapping[str, Outline]) -> nn.Module:
    """A module tree with a torch module of the right kind at each name; it is never called."""
    root = Skeleton()
    for name in sorted(outlines, key=lambda name: name.count(".")):
        owner: nn.Module = root
        *parents, leaf = name.split(".") if name else [""]
        for atom in parents:
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if not name or leaf in owner._modules:
            raise AdapterError(f"target {name!r}: expected a module of its own, found one inside of another target")
        owner.add_module(leaf, _stub(outlines[name]))
    return root


def _stub(outline: Outline) -> nn.Module:
    kind, weight, bias = outline.kind, outline.weight, outline.bias
    zero = torch.zeros((), dtype=outline.dtype, device=outline.device)  # seen as many, it takes no memory
    shape: tuple[int, ...] = (kind.out_features, kind.in_features)
    if isinstance(kind, Conv):
        shape = (kind.out_features, kind.in_features // kind.groups, *kind.kernel)
    weight = zero.expand(shape) if weight is None else weight
    bias = zero.expand(kind.out_features) if bias is None and outline.biased else bias
    module: nn.Module
    with torch.device("meta"):
        if isinstance(kind, Embedding):
            module, weight = nn.Embedding(kind.in_features, kind.out_features), weight.t()
        elif isinstance(kind, Conv):
            cls: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kind.kernel)]
            sizes = (_size(kind.stride), _size(kind.padding), _size(kind.dilation))
            module = cls(kind.in_features, kind.out_features, kind.kernel, *sizes, kind.groups, bias=bias is not None)
        else:
            module = nn.Linear(kind.in_features, kind.out_features, bias=bias is not None)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return module.eval()


def _size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def kind_to_json(kind: Kind) -> dict[str, Any]:
    """A kind as a manifest holds it."""
    found: dict[str, Any] = {"kind": kind.name, "in": kind.in_features, "out": kind.out_features}
    if isinstance(kind, Conv):
        found |= {k: getattr(kind, k) for k in ("kernel", "stride", "padding", "dilation", "groups")}
    return found


def kind_from_json(values: Mapping[str, Any], source: str) -> Kind:
    """The inverse of :func:`kind_to_json`.

    Raises:
        AdapterError: it is no such object.
    """
    try:
        name, size = values["kind"], (int(values["in"]), int(values["out"]))
        if name == "linear":
            return Linear(*size)
        if name == "embedding":
            return Embedding(*size)
        if name in ("conv1d", "conv2d", "conv3d"):
            stride, padding, dilation = (_size(values[k]) for k in ("stride", "padding", "dilation"))
            return Conv(*size, tuple(values["kernel"]), stride, padding, dilation, int(values["groups"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{source}: damaged: expected a target's kind, found {values!r} ({error})") from None
    raise AdapterError(f"{source}: expected a known kind of target, found {name!r}; it is of a later fxpeft")
