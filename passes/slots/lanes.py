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
from typing import Any

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.slot import LEAST, Slot, live_slot, live_slot_of_all_ranks
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node
from fxpeft.passes.torch_private import mark_dynamic


class Lanes(threading.local):
    """What the rows of this thread's calls are named for, shared by all slots of a model.

    Its attributes are set anew for each thread: Dynamo reads and guards them as those of the thread that calls, which
    it doesn't where an attribute of the class stands behind them.

    Args:
        count: how many adapters can be resident. max_rank: as of the slots. dynamic: whether calls pay for the rank in
            use only.

    ``mask``: ``[rows, r]`` or ``[rows, tokens, r]``, the weight of each rank; ``[0, ...]`` where none are named.
    ``weights``: ``[..., lanes]``, the weight of each lane, for shifts. ``picks``: ``[...]``, the lane whose gains a row
    has, or ``count``, for none. ``repeats``: how many rows of a call each may stand for, side by side. ``held``: what
    the owner of this remembers of its rows.
    """

    def __init__(self, count: int, max_rank: int, dynamic: bool = True) -> None:
        self.count, self.max_rank, self.dynamic = count, max_rank, dynamic
        self.held: Any
        self.clear()

    def clear(self) -> None:
        """Name no rows."""
        with torch.inference_mode(False):  # to Dynamo a tensor of inference mode is another kind
            self.mask, self.repeats, self.held = torch.empty(0, LEAST), 1, None
            self.weights, self.picks = torch.empty(0, self.count), torch.empty(0, dtype=torch.long)

    def name(self, mask: Tensor, weights: Tensor, picks: Tensor, repeats: int) -> None:
        """Name the rows of this thread's calls."""
        if self.dynamic and self.max_rank > LEAST:
            mark_dynamic(mask, mask.ndim - 1, LEAST, self.max_rank)
        self.mask, self.weights, self.picks, self.repeats = mask, weights, picks, repeats

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
    """The input of a target times its gains, those of each row where rows are named."""
    kind, lanes = slot.kind, slot.lanes
    if "g_in" not in slot.features:
        return x
    if lanes.mask.shape[0] == 0:
        return (x * kind.per_input(slot.g_in)).type_as(x)
    return (x * _of_rows(slot, x, slot.lane_g_in.index_select(0, _flat(lanes.picks, x)))).type_as(x)


@one_node
def adapted(slot: Slot, x: Tensor, y: Tensor) -> Tensor:
    """The output ``y`` of a target with what its slot adds and multiplies, those of each row where rows are named."""
    kind, lanes = slot.kind, slot.lanes
    if lanes.mask.shape[0] == 0:
        features = {name: getattr(slot, name) for name in slot.features if name != "g_in"}
        plain = live_slot_of_all_ranks if slot.rank is None else live_slot
        return plain(kind, lambda x: y, x, slot=slot, **features)
    out = y + packed(slot, x)
    if "g_out" in slot.features:
        out = out * _of_rows(slot, x, slot.lane_g_out.index_select(0, _flat(lanes.picks, x)))
    if "shift" in slot.features:
        out = out + _of_rows(slot, x, torch.matmul(lanes.weights.to(x.device), slot.lane_shift[:-1]))
    return out.type_as(y)


def packed(slot: Slot, x: Tensor) -> Tensor:
    """What each row's ranks add to the output, as two products with the ranks of all lanes, each row masked on them.

    Each factor is read once, however many rows there are.
    """
    kind, mask, r = slot.kind, slot.lanes.mask, slot.lanes.mask.size(-1)
    a, b, d = slot.a.narrow(0, 0, r), slot.b.narrow(0, 0, r), slot.d.narrow(0, 0, r)
    weights = _of_rows(slot, x, d * mask.to(d.device))
    h = kind.reduce_rows(x, a)
    # another lane's rank adds nothing to a row, and 0 * inf were NaN: chosen, not multiplied away
    return kind.expand_rows(torch.where(weights == 0, 0, (h * weights).type_as(h)), b)


def _of_rows(slot: Slot, x: Tensor, values: Tensor) -> Tensor:
    """Values of the named rows, ``[..., n]``, so that they broadcast over the features of this site's input or output.

    Raises:
        AdapterError: the site's rows are not those that were named.
    """
    kind, lanes = slot.kind, slot.lanes
    named, found = lanes.mask.shape[:-1], kind.leading(x)
    if len(named) == 1 and len(found) > 0 and lanes.repeats > 1 and found[0] == named[0] * lanes.repeats:
        return kind.per_row(values.reshape(named[0], -1).repeat_interleave(lanes.repeats, 0), x)
    if len(found) < len(named) or any(n != f for n, f in zip(named, found, strict=False)):
        raise AdapterError(
            f"{slot.site}: expected {_told(named)}, as rows or tokens were named, found an input of {list(x.shape)}: "
            "name as many as the batch has"
        )
    return kind.per_row(values.reshape(*named, values.shape[-1]), x)


def _flat(picks: Tensor, x: Tensor) -> Tensor:
    return picks.flatten().to(x.device)


def _told(named: torch.Size) -> str:
    return f"{named[0]} rows" if len(named) == 1 else f"{named[0]} rows of {named[1]} tokens"
