"""Lanes: the rows, or tokens, of one batch have adapters of their own, in one slot and one compiled graph.

    y = g_out[row] * (base(x') + ((x' A[:r]^T) * w[row]) B[:r]) + shift[row],    x' = g_in[row] * x,    w = d * mask

The adapters that share a batch are packed side by side along the rank, each in the same ranks at every site, so that
one ``mask`` ``[rows, r]`` says for all sites which ranks a row has, and with which weight. It is data of the thread
that calls: rows, blends and scales change without a write to any slot. The rank in use is the mask's last size, which
is symbolic in a compiled graph. A call that names no rows is the graph of a slot without lanes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.reach import LaneReach, other_tokens
from fxpeft.passes.slots.rotation import rotated, rotated_rows
from fxpeft.passes.slots.slot import LEAST, Slot, live_reached, live_slot, live_slot_of_all_ranks
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node
from fxpeft.passes.torch_private import mark_dynamic


class RowTensors(NamedTuple):
    """What the rows, or tokens, of a call are named for, as tensors; the leading sizes are theirs.

    ``mask``: ``[..., r]``, the weight of each packed rank. ``weights``: ``[..., lanes]``, of each lane, for shifts.
    ``picks``: ``[...]``, the lane whose gains a row has, or ``lanes``, for none. ``ranks``: ``[..., w]``, which ranks
    are a row's own, and ``own``: their weights, zero behind the last one.
    """

    mask: Tensor
    weights: Tensor
    picks: Tensor
    ranks: Tensor
    own: Tensor


class Lanes(threading.local):
    """What the rows of this thread's calls are named for, shared by all slots of a model.

    Its attributes are set anew for each thread: Dynamo reads and guards them as those of the thread that calls, which
    it doesn't where an attribute of the class stands behind them.

    Args:
        count: how many adapters can be resident. max_rank: as of the slots. dynamic: whether calls pay for the rank in
            use only.

    ``named``: what rows are named for, of no rows where none are. ``repeats``: how many rows of a call each may stand
    for, side by side. ``prompted``: whether one of them has a prompt. ``virtual``: ``[rows, tokens]``, where tokens are
    named and some have: the place of each in its adapter's prompt, or -1. ``reach``: from which tokens of the call on
    they act, read in slots that were declared for it. ``held``: what the owner of this remembers of its rows.
    """

    def __init__(self, count: int, max_rank: int, dynamic: bool = True) -> None:
        self.count, self.max_rank, self.dynamic = count, max_rank, dynamic
        self.held: Any
        self.clear()

    def clear(self) -> None:
        """Name no rows."""
        with torch.inference_mode(False):  # to Dynamo a tensor of inference mode is another kind
            sizes, numbers = ((0, LEAST), (0, self.count)), torch.empty(0, dtype=torch.long)
            mask, weights = (torch.empty(size) for size in sizes)
            self.named, self.repeats, self.held = RowTensors(mask, weights, numbers, numbers, mask), 1, None
            self.prompted, self.virtual, self.reach = False, numbers, LaneReach(numbers, numbers, numbers)

    def name(self, named: RowTensors, repeats: int, prompted: bool = False, virtual: Tensor | None = None) -> None:
        """Name the rows of this thread's calls."""
        self._sized(named.mask, named.ranks, named.own)
        self.named, self.repeats, self.prompted = named, repeats, prompted
        self.virtual = named.picks.new_empty(0) if virtual is None else virtual

    def act(self, reach: LaneReach) -> None:
        """Say from which tokens of this thread's call on the ranks act."""
        self._sized(reach.packed, reach.own)
        self.reach = reach

    def _sized(self, *tensors: Tensor) -> None:
        """Let a compiled graph be for any number of ranks, the tensors' last sizes."""
        for tensor in tensors if self.dynamic and self.max_rank > LEAST else ():
            mark_dynamic(tensor, tensor.ndim - 1, LEAST, self.max_rank)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lanes, (self.count, self.max_rank, self.dynamic)


def lane_rewrite(slot: Slot) -> Rewrite:
    """The rewrite of a live module whose slot has lanes."""
    return Rewrite("slot", live_lanes, {"": slot}, container="slot")


def live_lanes(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, slot: Slot) -> Tensor:
    """The serving subgraph: what goes into the target, and what becomes of its output, each by the rows' names."""
    x = gained(slot, x)
    return adapted(slot, x, base(x))


@one_node
def gained(slot: Slot, x: Tensor) -> Tensor:
    """The input of a target times its gains and rotated, by those of each row where rows are named."""
    kind, lanes = slot.kind, slot.lanes
    named = lanes.named.mask.shape[0] > 0
    if "g_in" in slot.features:
        gains = slot.lane_g_in.index_select(0, _flat(lanes.named.picks, x)) if named else slot.g_in
        x = (x * (of_rows(slot, x, gains) if named else kind.per_input(gains))).type_as(x)
    if "rotation" in slot.features and named:
        picks = _repeated(slot, x, lanes.named.picks.to(x.device).unsqueeze(-1)).squeeze(-1)
        x = rotated_rows(x, slot.lane_rotation, picks, kind.feature_dimension)
    elif "rotation" in slot.features:
        x = rotated(x, slot.rotation, kind.feature_dimension)
    return x


@one_node
def adapted(slot: Slot, x: Tensor, y: Tensor) -> Tensor:
    """The output ``y`` of a target with what its slot adds and multiplies, those of each row where rows are named."""
    kind, lanes = slot.kind, slot.lanes
    if lanes.named.mask.shape[0] == 0:
        features = {name: getattr(slot, name) for name in slot.features if name not in ("g_in", "rotation")}
        plain: Callable[..., Tensor] = live_slot_of_all_ranks if slot.rank is None else live_slot
        if slot.reach is not None:
            plain = live_reached
        return plain(kind, lambda x: y, x, slot=slot, **features)
    out = y + form_of(slot, x)(slot, x)
    if "g_out" in slot.features:
        out = out * of_rows(slot, x, slot.lane_g_out.index_select(0, _flat(lanes.named.picks, x)))
    if "shift" in slot.features:
        out = out + of_rows(slot, x, torch.matmul(lanes.named.weights.to(x.device), slot.lane_shift[:-1]))
    return out.type_as(y)


def packed(slot: Slot, x: Tensor) -> Tensor:
    """What each row's ranks add to the output, as two products with the ranks of all lanes, each row masked on them.

    Each factor is read once, however many rows there are; each row pays for the ranks of all.
    """
    kind, mask = slot.kind, slot.lanes.named.mask
    r = mask.size(-1)
    a, b, d = slot.a.narrow(0, 0, r), slot.b.narrow(0, 0, r), slot.d.narrow(0, 0, r)
    weights = of_rows(slot, x, d * mask.to(d.device))
    if (acts := acting(slot, x, slot.lanes.reach.packed)) is not None:
        weights = torch.where(acts, weights, 0)
    h = kind.reduce_rows(x, a)
    # another lane's rank adds nothing to a row, and 0 * inf were NaN: chosen, not multiplied away
    return kind.expand_rows(torch.where(weights == 0, 0, (h * weights).type_as(h)), b)


def gathered(slot: Slot, x: Tensor) -> Tensor:
    """The same as two batched products with each row's own ranks, which are gathered first.

    A row pays for its own ranks alone, and for their copy.
    """
    named = slot.lanes.named
    ranks, own = (_repeated(slot, x, each).to(x.device).flatten(0, -2) for each in (named.ranks, named.own))
    (rows, width), picks = ranks.shape, ranks.flatten()
    a, b = (factor.index_select(0, picks).view(rows, width, -1) for factor in (slot.a, slot.b))
    weights = (slot.d.index_select(0, picks).view(rows, width) * own).unsqueeze(1)
    if (acts := acting(slot, x, slot.lanes.reach.own)) is not None:
        weights = torch.where(acts.expand(*x.shape[:-1], width).reshape(rows, -1, width), weights, 0)
    h = torch.bmm(x.reshape(rows, -1, x.shape[-1]).type_as(a), a.transpose(1, 2))
    out = torch.bmm(torch.where(weights == 0, 0, (h * weights).type_as(h)), b)
    return out.view(*x.shape[:-1], -1)


def summed(slot: Slot, x: Tensor) -> Tensor:
    """The same for rows of one token, as sums over each row's own ranks, which are read where they lie.

    The first is one kernel of the compiler's, with the scale and the mask; the second the library's for bags of
    embeddings. For few rows a library's products are far from the speed of memory, and these copy nothing.
    """
    named, rows = slot.lanes.named, x.shape[0]
    ranks, own = (_repeated(slot, x, each).to(x.device) for each in (named.ranks, named.own))
    a, wide = slot.a[ranks], torch.promote_types(slot.a.dtype, torch.float32)
    weights = slot.d[ranks] * own
    if (acts := acting(slot, x, slot.lanes.reach.own)) is not None:
        weights = torch.where(acts.reshape(rows, -1), weights, 0)
    h = (x.reshape(rows, 1, -1).to(wide) * a.to(wide)).sum(-1)
    h = torch.where(weights == 0, 0, h * weights).type_as(slot.b)
    starts = (
        torch.arange(rows, device=x.device) * ranks.shape[1]
    )  # given, since those that are made are as many as asked
    out = F.embedding_bag(ranks.flatten(), slot.b, starts, mode="sum", per_sample_weights=h.flatten())
    return out.view(*x.shape[:-1], -1)


# multiplications that take as long as one number of a factor takes to be copied and read again: in a compiled graph (of
# eight rows the forms cross between 4 and 8 tokens), and as called on a CPU; one thread, 1,024 features, rank 16
MOVE, MOVE_AS_CALLED = 32, 2


def form_of(slot: Slot, x: Tensor) -> Callable[[Slot, Tensor], Tensor]:
    """The form that costs least, by the shapes and the device.

    With ``r`` ranks in a batch, of which each of ``rows`` of ``tokens`` has ``w``, :func:`packed` multiplies
    ``rows * tokens * r`` times for each feature, :func:`gathered` ``rows * tokens * w`` times, and moves ``rows * w``
    numbers: it costs less where ``tokens * (r - w)`` is above :data:`MOVE` times ``w``. A compiler doesn't know these
    ranks: ``r / w`` is taken for the number of lanes, since those that no row has may lie before one that some row has.
    Of one token and four lanes or more, compiled for a CPU, :func:`summed` moves nothing.
    """
    named, lanes, on_cpu = slot.lanes.named, slot.lanes, x.device.type == "cpu"
    if not slot.kind.gathers or not lanes.dynamic:
        return packed
    tokens = x.shape[named.mask.ndim - 1 : -1].numel()  # of a row, or 1, where each has a name of its own
    if not torch.compiler.is_compiling():
        packs, own = named.mask.shape[-1], named.ranks.shape[-1]
        return gathered if tokens * (packs - own) > (MOVE_AS_CALLED if on_cpu else MOVE) * own else packed
    if named.mask.ndim > 2:
        return packed
    if tokens == 1 and lanes.count > 3 and on_cpu and not torch.is_grad_enabled():
        return summed
    return gathered if tokens * (lanes.count - 1) > MOVE else packed


def acting(slot: Slot, x: Tensor, since: Tensor) -> Tensor | None:
    """Whether ranks act, ``[rows, tokens, ..., n]`` for an input ``[rows, tokens, ..., in]``; ``None``: all do.

    Args:
        since: ``[rows, n]``, the place of the first token of each, as in :class:`LaneReach`.

    Raises:
        AdapterError: the site doesn't see the call's tokens.
    """
    places = slot.lanes.reach.places
    if slot.reach is None or places.shape == (0,):
        return None
    since = since.to(x.device)
    if places.ndim == 0:
        acts: Tensor = of_rows(slot, x, places >= since)
        return acts
    leading = x.shape[:-1]
    if len(leading) == 2 and leading[1] == slot.lanes.reach.kept:
        places = places[-leading[1] :]
    if len(leading) < 2 or leading[0] != since.shape[0] or leading[1] != places.shape[0]:
        raise other_tokens(slot.site, (since.shape[0], places.shape[0]), x)
    acts = places.unsqueeze(-1) >= since.unsqueeze(1)
    return acts.view(*leading[:2], *(1 for _ in leading[2:]), -1)


def of_rows(slot: Any, x: Tensor, values: Tensor) -> Tensor:
    """Values of the named rows, ``[..., n]``, so that they broadcast over the features of an input or output here."""
    found: Tensor = slot.kind.per_row(_repeated(slot, x, values), x)
    return found


def _repeated(slot: Any, x: Tensor, values: Tensor) -> Tensor:
    """Values of the named rows, ``[..., n]``, for as many rows as the input has.

    Raises:
        AdapterError: the site's rows are not those that were named.
    """
    return for_rows(slot.lanes, slot.site, values, slot.kind.leading(x), x.shape)


def for_rows(lanes: Lanes, site: str, values: Tensor, leading: torch.Size, shape: torch.Size) -> Tensor:
    """Values of the named rows, ``[..., n]``, for as many rows as the ``leading`` sizes of a ``shape`` say.

    Raises:
        AdapterError: those are not the rows that were named.
    """
    named, repeats = lanes.named.mask.shape[:-1], lanes.repeats
    values = values.reshape(*named, values.shape[-1])
    if len(named) == 1 and len(leading) > 0 and repeats > 1 and leading[0] == named[0] * repeats:
        return values.repeat_interleave(repeats, 0)
    if len(leading) < len(named) or any(n != f for n, f in zip(named, leading, strict=False)):
        raise AdapterError(
            f"{site}: expected {_told(named)}, as rows or tokens were named, found an input of {list(shape)}: "
            "name as many as the batch has"
        )
    return values


def owners(lanes: Lanes, brings: Tensor) -> Tensor:
    """For each named row, or token, which of its lanes brings something, ``[...]``; ``lanes.count``, where none does.

    Args:
        brings: ``[lanes]``, whether each does. Of a row's lanes one at most may.
    """
    own = (lanes.named.weights != 0).to(brings.device) & brings
    return torch.where(own.any(-1), own.int().argmax(-1), lanes.count)


def _flat(picks: Tensor, x: Tensor) -> Tensor:
    return picks.flatten().to(x.device)


def _told(named: torch.Size) -> str:
    return f"{named[0]} rows" if len(named) == 1 else f"{named[0]} rows of {named[1]} tokens"
