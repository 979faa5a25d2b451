"""Parameters as targets: one matrix, or one for each expert, that a module's own forward applies in its own way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxpeft.passes.targets.kinds import Kind


@dataclass(frozen=True)
class ParameterKind(Kind):
    """A parameter ``leaf`` of a module: ``[out, in]``, or a stack of such, one for each expert.

    The factors of all experts lie in one A ``[rank * experts, in]``, expert by expert, and one B
    ``[out, rank * experts]``, rank by rank (PEFT's ``lora.layer.ParamWrapper``).

    Args:
        experts: the size of a stack; ``None``: the parameter is one matrix.
        transposed: the stack is ``[experts, in, out]``, not ``[experts, out, in]``.
    """

    leaf: str = ""
    experts: int | None = None
    transposed: bool = False

    family = "parameter"
    is_linear = False
    is_parameter = True
    updates_weight = True
    takes_bias = False
    takes_gain = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """``parameter``, or ``parameter[8]`` for a stack of eight."""
        return "parameter" if self.experts is None else f"parameter[{self.experts}]"

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return 1 if self.experts is None else self.experts

    def host(self, site: str) -> str:
        return site.rpartition(".")[0]

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (rank * self.count, self.in_features)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank * self.count)

    def slot_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.count, self.in_features), (rank, self.count, self.out_features)

    def ranks(self, a: Tensor) -> Tensor:
        return a.reshape(self.count, -1, self.in_features).transpose(0, 1)

    def unranks(self, ranks: Tensor) -> Tensor:
        return ranks.transpose(0, 1).flatten(0, 1)

    def rows(self, b: Tensor) -> Tensor:
        return b.t().reshape(-1, self.count, self.out_features)

    def unrows(self, rows: Tensor, rank: int) -> Tensor:
        return rows.flatten(0, 1).t()

    def delta(self, a: Tensor, rows: Tensor) -> Tensor:
        """The change of the parameter, in its own shape, from ``[rank, experts, in]`` and ``[rank, experts, out]``."""
        delta = torch.einsum("rei,reo->eio" if self.transposed else "rei,reo->eoi", a, rows)
        return delta[0] if self.experts is None else delta

    def updated(self, weight: Tensor, a: Tensor, rows: Tensor) -> Tensor:
        """``weight`` plus :meth:`delta`, without holding that; traceable."""
        left, right = self.factors(a, rows)
        if self.experts is None:
            return add_product(weight.unsqueeze(0), left, right).squeeze(0)
        return add_product(weight, left, right)

    def factors(self, a: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Two stacks whose product is :meth:`delta`, ``[experts, ..., rank]`` and ``[experts, rank, ...]``."""
        left, right = (a, rows) if self.transposed else (rows, a)
        return left.permute(1, 2, 0), right.transpose(0, 1)


def add_product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``weight + left @ right`` of stacks of matrices, rounded once to the weight's dtype, under autocast too.

    The factors are rounded to that dtype first (PEFT's rule): a product in another one would be held beside
    the sum, and is as large as all experts together. In a graph this is one node.
    """
    given = (weight, left, right)
    if has_torch_function(given):
        return handle_torch_function(add_product, given, *given)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype))
