"""Products with one matrix: ``nn.Linear``, quantised linears, Conv1D, and what they are in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxpeft.passes import replaced
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.spec import OpSpec, Places
from fxpeft.passes.targets.reading import Unsupported, Weight
from fxpeft.passes.targets.update import update
from fxpeft.passes.torch_private import LINEAR as LINEAR_FUNCTION

aten = torch.ops.aten
_PLAIN = (LINEAR_FUNCTION, replaced.linear, aten.linear.default)
_ADDED = Places(input=1, weight=(2, "mat2"), bias=(0, "input"), flip=True)


@dataclass(frozen=True)
class Linear(Kind):
    """``F.linear``; also ``addmm`` with the weight stored ``[in, out]`` (GPT-2's Conv1D)."""

    takes_lanes = gathers = takes_rotation = takes_kronecker = True

    def update_ranks(
        self, x: Tensor, a: Tensor, b: Tensor, d: Tensor, *, narrowed: bool, masked: bool = True
    ) -> Tensor:
        return update(x, a, b, d, masked)


def _read(node: Node, weight: Weight) -> Linear:
    shape = weight.shape
    if node.target in _PLAIN:
        if weight.transposed or len(shape) != 2:
            raise Unsupported(f"its weight is not a plain [out, in] matrix: {tuple(shape)}")
        return Linear(shape[1], shape[0])
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise Unsupported("addmm with alpha or beta other than 1")
    return Linear(shape[1], shape[0]) if weight.transposed else Linear(shape[0], shape[1])


def _of_module(module: nn.Module) -> Linear | None:
    """Anything with ``in_features`` and ``out_features`` counts, so that quantised linears of any library do."""
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return Linear(into, out) if isinstance(into, int) and isinstance(out, int) else None


def _stub(kind: Kind, biased: bool) -> nn.Module:
    return nn.Linear(kind.in_features, kind.out_features, bias=biased)


LINEAR = OpSpec(
    kind=Linear,
    calls={
        **dict.fromkeys(_PLAIN, Places()),
        **dict.fromkeys((torch.addmm, aten.addmm.default), _ADDED),
        aten.mm.default: Places(weight=(1, "mat2"), bias=None, flip=True),
    },
    read=_read,
    modules=(nn.Linear,),
    of_module=_of_module,
    stub=_stub,
)
