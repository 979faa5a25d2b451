"""The kinds of target a rewrite knows, and the linear algebra that each kind gives a method.

A low-rank method is the same sentence for every kind: *reduce* the input to ``rank`` numbers,
*scale* them, *expand* them to the output. What reducing means (a matrix product, a table look-up,
a convolution) is the kind's; which factors and scales, the method's. All functions here that take
tensors are plain and traceable: they are called on ``torch.fx`` proxies while a graph is rewritten,
and on tensors when a slot is checked against its training subgraph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.targets import convolution


@dataclass(frozen=True)
class Kind:
    """A target that maps ``in_features`` to ``out_features``.

    ``a_shape`` / ``b_shape`` are the shapes in which PEFT keeps a LoRA's two factors: the rank comes
    first in A, and after the outputs in B.
    """

    in_features: int
    out_features: int

    name = "linear"
    takes_bias = True  # whether a term may be added per output feature, as lora_bias does
    takes_gain = True  # whether the input can be multiplied
    leaf = ""  # of a target that is a parameter: its name in its module

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

    def per_output(self, c: Tensor) -> Tensor:
        """View one number per output feature, ``[out]``, so that it broadcasts over the output."""
        return c

    def per_input(self, c: Tensor) -> Tensor:
        """View one number per input feature, ``[in]``, so that it broadcasts over the input."""
        return self.per_output(c)

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


@dataclass(frozen=True)
class Linear(Kind):
    """``F.linear``; also ``addmm`` with the weight stored ``[in, out]`` (GPT-2's Conv1D)."""


@dataclass(frozen=True)
class Embedding(Kind):
    """``F.embedding``: ``in_features`` is the number of rows, ``out_features`` their width.

    ``options`` are the look-up's own (``padding_idx``, ``max_norm``, ...), applied to A's look-up too.
    """

    options: tuple[tuple[str, Any], ...] = field(default=())

    name = "embedding"
    takes_bias = False
    takes_gain = False

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """Token ids ``[...]`` to ``[..., rank]``: the ids' columns of A."""
        return F.embedding(x, a.t(), **dict(self.options))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.t(), **dict(self.options))


@dataclass(frozen=True)
class Conv(Kind):
    """``F.conv1d`` / ``conv2d`` / ``conv3d``, grouped or not.

    A is a convolution over all input channels with the target's own kernel, stride and padding;
    B is a 1x1 convolution with the target's groups (PEFT's ``lora.layer._ConvNd``). PEFT's A has no
    dilation, which fits a dilated target with ``padding="same"`` only: there A has none here
    either, elsewhere it has the target's.
    """

    kernel: tuple[int, ...] = ()
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        """``conv1d``, ``conv2d`` or ``conv3d``."""
        return f"conv{len(self.kernel)}d"

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.in_features, *self.kernel)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank // self.groups, *(1 for _ in self.kernel))

    def check_rank(self, rank: int) -> str | None:
        if rank > 0 and rank % self.groups:
            return f"rank must be divisible by the convolution's {self.groups} groups, found {rank}"
        return super().check_rank(rank)

    def _conv(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = getattr(F, self.name)(*args, **kwargs)
        return out

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return self._conv(x.type_as(a), a, None, self.stride, self.padding, self._dilation_of_a)

    def reduce_rows(self, x: Tensor, a: Tensor) -> Tensor:
        return convolution.convolve(x.type_as(a), a, self.stride, self.padding, self._dilation_of_a)

    @property
    def _dilation_of_a(self) -> Any:
        return 1 if self.padding == "same" else self.dilation

    def scale(self, h: Tensor, d: Tensor) -> Tensor:
        return (h * self.per_output(d)).type_as(h)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return self._conv(h, b, groups=self.groups)

    def expand_rows(self, h: Tensor, b: Tensor) -> Tensor:
        # a slot's B is dense: a grouped one is written there with zeros off its blocks
        return convolution.mix(h, b.t(), len(self.kernel))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def per_output(self, c: Tensor) -> Tensor:
        return c.view(-1, *(1 for _ in self.kernel))

    def rows(self, b: Tensor) -> Tensor:
        flat = b.flatten(1)  # [out, rank / groups]
        if self.groups == 1:
            return flat.t()
        blocks = flat.view(self.groups, self.out_features // self.groups, -1)
        dense: Tensor = torch.block_diag(*blocks.transpose(1, 2))  # type: ignore[no-untyped-call]
        return dense

    def unrows(self, rows: Tensor, rank: int) -> Tensor:
        if self.groups == 1:
            return rows.t().reshape(self.b_shape(rank))
        per_group, per_out = rank // self.groups, self.out_features // self.groups
        blocks = rows.view(self.groups, per_group, self.groups, per_out)
        diagonal = torch.stack([blocks[g, :, g].t() for g in range(self.groups)])
        return diagonal.reshape(self.b_shape(rank))
