"""Which ranks of slots may hold something."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.torch_private import zero_each


def clear_ranks(
    slots: Mapping[str, Slot], dirty: Mapping[str, int], used: Mapping[str, int], active: int
) -> Mapping[str, int]:
    """Zero the old ranks that a swap would compute with: they may even be NaN.

    Args:
        dirty: site -> number of leading ranks that may hold something other than zero. used: those of the swap.
        active: the rank that will be in use.

    Returns:
        ``dirty`` after the swap; ``used`` itself where it is equal.
    """
    stale: list[Tensor] = []
    written: list[Tensor] = []
    left_dirty = dict[str, int]()
    for site, slot in slots.items():
        start, before = used.get(site, 0), dirty.get(site, 0)
        if min(before, active) > start:
            stale += slot.window(start, min(before, active) - start)
            written += (t for t in (slot.a, slot.b, slot.d) if not t.is_inference())
        if left := before if before > active else start:
            left_dirty[site] = left
    if stale:
        zero_each(stale)
        torch.autograd.graph.increment_version(written)  # windows have counters of their own
    return used if left_dirty == used else left_dirty
