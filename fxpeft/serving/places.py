"""Where the adapters of slots with lanes lie, and the copies that bring each to its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpeft.adapters.state import Adapter
from fxpeft.methods.base import SlotValues
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.torch_private import zero_each


@dataclass(frozen=True, eq=False)
class Place:
    """Where an adapter is: in which lane, from which rank on, over how many, the same at every site.

    Args:
        alone: it is the first of those that a call without rows computes with.
        gains: it has gains at some site, or rows of an embedding, which a row of a batch has of one adapter alone.
    """

    adapter: Adapter
    lane: int
    start: int
    width: int
    alone: bool
    gains: bool

    def same(self, other: Place | None) -> bool:
        """Whether the other has the same in the same place."""
        if other is None or self.adapter is not other.adapter:
            return False
        return (self.lane, self.start, self.width, self.alone) == (other.lane, other.start, other.width, other.alone)


def lane_copies(slots: Mapping[str, Slot], place: Place, memory: list[int]) -> Copies:
    """The copies of an adapter to its place, kept while it comes to the same one."""
    adapter, where = place.adapter, {"start": place.start, "alone": int(place.alone)}
    if adapter.copies is not None and adapter.copies[0] is memory and adapter.copies[2] == where:
        return adapter.copies[1]
    pairs: list[tuple[Tensor, Tensor]] = []
    written: list[Tensor] = []
    for site, value in adapter.lowered.items():
        slot = slots[site]
        if rank := value.d.numel():
            pairs += zip(slot.window(place.start, rank), value[:3], strict=True)
            written += (slot.a, slot.b, slot.d)
        if place.alone:
            for name, own in value.features().items():
                pairs.append((slot.beside(name), own))
                written.append(getattr(slot, name))
    copies = Copies(pairs, written, join=adapter.settled)
    if adapter.settled:
        adapter.copies = (memory, copies, where)
    return copies


def clear_windows(slots: Mapping[str, Slot], ranges: Sequence[tuple[int, int]]) -> None:
    """Switch ranks off at all sites; what A and B hold there stays, and is finite: see :func:`check_finite`."""
    stale = [slot.window(start, count)[2] for start, count in ranges if count for slot in slots.values()]
    if stale:
        zero_each(stale)
        torch.autograd.graph.increment_version([s.d for s in slots.values() if not s.d.is_inference()])


def check_finite(lowered: Mapping[str, SlotValues]) -> list[str]:
    """Where an adapter holds NaN or infinity, which other rows would get too: sums over ranks go over all lanes."""
    return [
        f"{site}: holds NaN or infinity, which beside other lanes would reach their rows; prepare without lanes for it"
        for site, value in lowered.items()
        if not all(bool(torch.isfinite(t).all()) for t in value if t is not None)
    ]
