"""What a kind of target gives a method: its linear algebra, and what it can do.

A low-rank method is the same sentence for every kind: *reduce* the input to ``rank`` numbers,
*scale* them, *expand* them to the output. What reducing means (a matrix product, a table look-up,
a convolution) is the kind's; which factors and scales, the method's. All functions here that take
tensors are plain and traceable: they are called on ``torch.fx`` proxies while a graph is rewritten,
and on tensors when a slot is checked against its training subgraph. The kinds themselves are in
:mod:`fxpeft.passes.targets.operations`, one file each with how it is found in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

K = TypeVar("K", bound="Kind")


@dataclass(frozen=True)
class Kind:
    """A target that maps ``in_features`` to ``out_features``.

    ``a_shape`` / ``b_shape`` are the shapes in which PEFT keeps a LoRA's two factors: the rank comes
    first in A, and after the outputs in B.
    """

    in_features: int
    out_features: int

    name = "linear"  # in messages, plans, patterns and manifests
    family = "linear"  # what several names have in common, as conv1d and conv2d
    is_linear = True  # whether its input is multiplied with one matrix, which may be decomposed
    looks_up = False  # whether its input is the numbers of columns of A
    takes_bias = True  # whether a term may be added per output feature, as lora_bias does
    takes_gain = True  # whether the input can be multiplied
    takes_rotation = False  # whether blocks of the input's features can be rotated, and the weight's for them
    takes_kronecker = False  # whether two small products can be applied in the way of its weight
    takes_lanes = False  # whether rows of its input may have adapters of their own
    gathers = False  # whether each row can be multiplied with factors of its own
    feature_dimension = -1  # where its input has its features
    like_target = True  # whether A is applied in the way of the target's own weight
    leaf = ""  # of a target that is a parameter: its name in its module
    is_parameter = False  # whether targets are named by a parameter, not by its module
    updates_weight = False  # whether a rewrite gives what reads the weight another one, not another output

    @property
    def groups(self) -> int:
        """Into how many parts that don't mix inputs and outputs fall."""
        return 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a weight ``[out, in, *kernel]`` beside its features."""
        return ()

    def settings(self) -> dict[str, Any]:
        """What a manifest holds of it beside its name and features."""
        return {}

    @classmethod
    def of_settings(cls: type[K], in_features: int, out_features: int, settings: Mapping[str, Any]) -> K:
        """The inverse of :meth:`settings`.

        Raises:
            KeyError, TypeError, ValueError: they are none.
        """
        return cls(in_features, out_features)

    def host(self, site: str) -> str:
        """The name of the module whose forward is rewritten for a site: its own, or the one that a parameter is of."""
        return site

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of A: ``[rank, in, ...]``."""
        return (rank, self.in_features)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of B: ``[out, rank, ...]``."""
        return (self.out_features, rank)

    def slot_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B rank first, as slots hold them."""
        return self.a_shape(rank), (rank, self.out_features)

    def check_rank(self, rank: int) -> str | None:
        """Why ``rank`` can't be used here, or ``None``."""
        return None if rank > 0 else f"rank must be positive, found {rank}"

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """``[..., in] -> [..., rank]`` in the dtype of ``a``."""
        return F.linear(x.type_as(a), a)

    def reduce_rows(self, x: Tensor, a: Tensor) -> Tensor:
        """:meth:`reduce` for an A that was narrowed to a number of ranks which a compiler does not know."""
        return self.reduce(x, a)

    def scale(self, h: Tensor, d: Tensor) -> Tensor:
        """Multiply the reduced input by a scalar or by one number per rank, rounding once."""
        return (h * d).type_as(h)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        """``[..., rank] -> [..., out]`` with B in the shape of :meth:`b_shape`."""
        return F.linear(h, b)

    def expand_rows(self, h: Tensor, b: Tensor) -> Tensor:
        """``[..., rank] -> [..., out]`` with B rank-first, ``[rank, out]``, as slots hold it.

        Not ``addmm``, which would save a sum: Inductor (torch 2.13) asks it whether the rank is at
        most 16, and the rank would be symbolic no longer.
        """
        return torch.matmul(h, b)

    def update(self, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """What a low-rank method adds to the output; A and B in the shapes of :meth:`a_shape`, :meth:`b_shape`."""
        return self.expand(self.scale(self.reduce(x, a), scale), b)

    def update_ranks(
        self, x: Tensor, a: Tensor, b: Tensor, d: Tensor, *, narrowed: bool, masked: bool = True
    ) -> Tensor:
        """:meth:`update` with A, B and a number per rank as slots hold them.

        Args:
            narrowed: to a number of ranks which a compiler does not know.
            masked: whether any of the numbers may be zero; a kind may take it that some are.
        """
        h = self.scale(self.reduce_rows(x, a) if narrowed else self.reduce(x, a), d)
        # a rank that is off adds nothing to any input, and 0 * inf were NaN: chosen, not multiplied away
        return self.expand_rows(torch.where(self.per_output(d) == 0, 0, h), b)

    def gained(self, b: Tensor, gain: Tensor) -> Tensor:
        """B in the shape of :meth:`b_shape` whose outputs are multiplied by one number each, ``[out]``."""
        return b * gain.view(-1, *(1 for _ in self.b_shape(1)[1:]))

    def per_output(self, c: Tensor) -> Tensor:
        """View one number per output feature, ``[out]``, so that it broadcasts over the output."""
        return c

    def per_input(self, c: Tensor) -> Tensor:
        """View one number per input feature, ``[in]``, so that it broadcasts over the input."""
        return self.per_output(c)

    def leading(self, x: Tensor) -> torch.Size:
        """The sizes of an input before its features: rows, tokens and the like."""
        return x.shape[:-1]

    def per_row(self, c: Tensor, x: Tensor) -> Tensor:
        """View numbers of an input's rows, or tokens, ``[..., n]``, so that they broadcast over ``n`` features."""
        rows = c.shape[:-1]
        return c.view(*rows, *(1 for _ in self.leading(x)[len(rows) :]), c.shape[-1])

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The target's own operation without its bias; ``weight`` is ``[out, in, ...]`` as :meth:`delta`."""
        return F.linear(x, weight)

    def delta(self, a: Tensor, rows: Tensor) -> Tensor:
        """The change of the weight, ``[out, in, ...]``, that A and a rank-first B ``[rank, out]`` make."""
        return (rows.t() @ a.flatten(1)).view(self.out_features, *self.a_shape(1)[1:])

    def ranks(self, a: Tensor) -> Tensor:
        """A from :meth:`a_shape` to rank-first, as slots hold it; a view."""
        return a

    def unranks(self, ranks: Tensor) -> Tensor:
        """The inverse of :meth:`ranks`; a view wherever that is possible."""
        return ranks

    def rows(self, b: Tensor) -> Tensor:
        """B from :meth:`b_shape` to rank-first ``[rank, out]``; a view wherever that is possible."""
        return b.t()

    def unrows(self, rows: Tensor, rank: int) -> Tensor:
        """The inverse of :meth:`rows`."""
        return rows.t()

    def why_no_delta(self, module: nn.Module) -> str | None:
        """Why a low-rank update of a target, a module, is no change of its weight, or ``None``."""
        return None
