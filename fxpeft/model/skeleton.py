"""A model in outline: plain torch modules at the names of a program's targets, so that all that
reads a model (plans, checkpoints, lowering, slots) works where there is only a graph or a manifest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.registry import operation_named, operation_of_kind


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
    """The root of a model in outline; ``parameters_at`` are the targets that are parameters of a module."""

    parameters_at: frozenset[str] = frozenset()


def skeleton(outlines: Mapping[str, Outline]) -> nn.Module:
    """A module tree with a torch module of the right kind at each name; it is never called."""
    root = Skeleton()
    for name in _parents_first(outlines):
        owner: nn.Module = root
        *parents, leaf = name.split(".") if name else [""]
        for atom in parents:
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if not name or leaf in owner._modules:
            raise AdapterError(f"target {name!r}: expected a module of its own, found one inside of another target")
        if outlines[name].kind.is_parameter:
            owner.register_parameter(leaf, _stub(outlines[name]).get_parameter(leaf))
        else:
            owner.add_module(leaf, _stub(outlines[name]))
    root.parameters_at = frozenset(name for name, outline in outlines.items() if outline.kind.is_parameter)
    return root


def _parents_first(names: Collection[str]) -> list[str]:
    """In their order, but each after those that it is inside of."""
    above = {name: [name[:at] for at, mark in enumerate(name) if mark == "."] for name in names}
    return list(dict.fromkeys(part for name in names for part in (*above[name], name) if part in names))


def _stub(outline: Outline) -> nn.Module:
    operation, weight, bias = operation_of_kind(outline.kind), outline.weight, outline.bias
    leaf = outline.kind.leaf or "weight"
    zero = torch.zeros((), dtype=outline.dtype, device=outline.device)  # seen as many, it takes no memory
    with torch.device("meta"):
        module = operation.stub(outline.kind, bias is not None or outline.biased)
    if weight is None:
        weight = zero.expand(module.get_parameter(leaf).shape)
    elif operation.flip:
        weight = weight.t()
    module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    if module._parameters.get("bias") is not None:
        bias = zero.expand(outline.kind.out_features) if bias is None else bias
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return module.eval()


def kind_to_json(kind: Kind) -> dict[str, Any]:
    """A kind as a manifest holds it."""
    found: dict[str, Any] = {"kind": kind.name, "in": kind.in_features, "out": kind.out_features}
    return found | kind.settings()


def kind_from_json(values: Mapping[str, Any], source: str) -> Kind:
    """The inverse of :func:`kind_to_json`.

    Raises:
        AdapterError: it is no such object.
    """
    try:
        name, size = values["kind"], (int(values["in"]), int(values["out"]))
        operation = operation_named(name)
        if operation is not None:
            return operation.kind.of_settings(*size, values)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{source}: damaged: expected a target's kind, found {values!r} ({error})") from None
    raise AdapterError(f"{source}: expected a known kind of target, found {name!r}; it is of a later fxpeft")
