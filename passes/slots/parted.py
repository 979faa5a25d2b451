"""A low-rank update at a linear module that tensor parallelism has parted (``parallelize_module``, ``tp_plan``).

Its processes hold rows of the weight, and each gives the columns of the output that are its own; or columns of it, and
each gets those of the input and gives a part of the sum. A and B go with them::

    rows       h = x A^T               y[mine] += h B[mine]^T     h's gradient is summed over the processes
    columns    h = sum x[mine] A[mine]^T    y += h B^T            h is summed

So what is exchanged is of the rank's size, and each process has the whole gradient of what it holds. Which of the two
it is, and whether what surrounds the module gathers its output, the widths of ``x`` and ``y`` say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.slot import Slot, in_use
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node


def parted_lora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    weight: Tensor,
) -> Tensor:
    """The training subgraph; A and B are parted as the weight is, each along the dimension that they share with it."""
    return add_update(base(x), x, lora_A, lora_B, scaling, weight)


def parted_slot(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, slot: Slot, weight: Tensor) -> Tensor:
    """The serving subgraph: every process holds the whole slot, and reads what is its own."""
    ranks = in_use(slot)
    return add_ranks(base(x), x, ranks[0], ranks[1], ranks[2], weight)


def parted_rewrite(slot: Slot) -> Rewrite:
    """A parted live module's rewrite, which reads its slot and how its own weight is parted."""
    return Rewrite("slot", parted_slot, {"": slot}, container="slot", reads=("weight",))


@one_node
def add_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, weight: Tensor) -> Tensor:
    """``y`` with the update. ``a``: [rank, in], ``b``: [out, rank], DTensors; ``x`` and ``y`` are such, or local."""
    return _joined(y, _update(y, x, a, b, lambda h: (h * scaling).type_as(h), weight), weight)


@one_node
def add_ranks(y: Tensor, x: Tensor, a: Tensor, rows: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """The same with a slot's ranks: ``a``: [rank, in], ``rows``: [rank, out], ``d``: [rank], all of them whole."""
    return _joined(y, _update(y, x, a, rows.t(), lambda h: torch.where(d == 0, 0, (h * d).type_as(h)), weight), weight)


def _update(y: Any, x: Any, a: Any, b: Any, scale: Callable[[Tensor], Tensor], weight: Any) -> Tensor:
    """This process's part of the update, a plain tensor."""
    mesh, x, y = weight.device_mesh, _local(x), _local(y)
    into, out = x.shape[-1] != a.shape[1], y.shape[-1] != b.shape[0]
    a, b = (_part(t, dim, cut, mesh) for t, dim, cut in ((a, 1, into), (b, 0, out)))
    h = F.linear(x.type_as(a), a)
    if into:
        h = _Summed.apply(h, mesh.get_group())  # type: ignore[no-untyped-call]
    h = scale(h)
    if out and h.requires_grad:
        h = _GradientSummed.apply(h, mesh.get_group())  # type: ignore[no-untyped-call]
    return F.linear(h, b)


def _joined(y: Any, update: Tensor, weight: Any) -> Tensor:
    """The output with a process's part of the update, as the output is: local, or a DTensor."""
    if not hasattr(y, "placements"):
        summed: Tensor = (y + update).type_as(y)
        return summed
    from torch.distributed.tensor import DTensor, Replicate, Shard  # not where nothing is parted

    if any(place.is_partial() for place in y.placements):
        y = y.redistribute(placements=[Replicate()])
    cut = update.shape[-1] != y.shape[-1]
    whole = DTensor.from_local(update, weight.device_mesh, [Shard(-1) if cut else Replicate()], run_check=False)
    joined: Tensor = (y + whole).type_as(y)
    return joined


def _local(t: Any) -> Tensor:
    return t.to_local() if hasattr(t, "placements") else t  # type: ignore[no-any-return]


def _part(t: Any, dim: int, cut: bool, mesh: Any) -> Tensor:
    """A factor, whole or this process's part of it, whichever it is held as."""
    if hasattr(t, "placements"):
        return t.to_local() if cut or not t.placements[0].is_shard() else t.full_tensor()  # type: ignore[no-any-return]
    if not cut:
        return t  # type: ignore[no-any-return]
    width = t.shape[dim] // mesh.size()
    return t.narrow(dim, mesh.get_local_rank() * width, width)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    """The sum over the processes, each of which gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, group: Any) -> Tensor:
        h = h.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(h, group=group)
        return h

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GradientSummed(torch.autograd.Function):
    """What each process has alike, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
