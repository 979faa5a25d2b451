"""A scale that one call asks for, in the slots: d and W1 times a factor, and what gains and shifts follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxpeft.adapters.calls import check_factor
from fxpeft.adapters.state import Adapter, find_state
from fxpeft.errors import AdapterError
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.kronecker import KRONECKER
from fxpeft.serving.lowering import lower
from fxpeft.serving.swap import Serving


@torch.no_grad()
def rescale(serving: Serving, module: nn.Module | None, factor: float) -> None:
    """Write the scales of what is in the slots, times a factor. Part of a write of the lock.

    Of A and B nothing is written, however large they are; of adapters with gains or shifts those are.

    Args:
        module: what is called. Gains follow from the base's weights, so that it has to be the whole model for these.

    Raises:
        AdapterError: an adapter can't have the scale; nothing was written.
    """
    board, lock = serving.board, serving.lock
    shown = serving.shown if board is None else [place.adapter for place in board.placed.values()]
    for adapter in shown:
        check_factor(adapter, factor)
    follow = (a for a in shown if any(value.features().keys() - KRONECKER for value in a.lowered.values()))
    featured = {adapter.name for adapter in follow} if factor != 1 else set()
    if featured and (module is None or find_state(module) is None or board is not None):
        raise AdapterError(
            f"a call asks for the scale {factor:g}: {', '.join(sorted(featured))} has gains that follow from its "
            "scale, which can change where the whole model is called, and in slots without lanes; or use set_scale"
        )
    # whose values are of that scale already, and whose d is still to be multiplied
    scaled = [_at(module, serving, a, factor) if a.name in featured else a for a in shown]
    pairs: list[tuple[Tensor, Tensor]] = []
    for site, start, adapter in _places(serving, scaled):
        d = adapter.lowered[site].d
        pairs.append((serving.slots[site].window(start, len(d))[2], d if adapter.name in featured else d * factor))
    with nullcontext() if serving.order is None else serving.order.writing() as ready:
        if ready is not None:
            ready()
        lock.factor, lock.version = math.nan, lock.version + 1  # until all is written
        Copies(pairs, [slot.d for slot in serving.slots.values()], join=False).run()
        for site, slot in serving.slots.items() if board is None else ():
            for name in slot.features:
                given = {a.name: v for a in scaled if (v := getattr(a.lowered.get(site), name, None)) is not None}
                values = [v * factor if name == "w1" and own not in featured else v for own, v in given.items()]
                if values:
                    getattr(slot, name).copy_(values[0] if len(values) == 1 else torch.stack(values).sum(0))
        lock.factor = factor


Serving.rescaling = staticmethod(rescale)


def _at(module: nn.Module | None, serving: Serving, adapter: Adapter, factor: float) -> Adapter:
    assert module is not None
    return lower(module, serving, replace(adapter, strength=adapter.stronger(factor)))


def _places(serving: Serving, shown: list[Adapter]) -> Iterator[tuple[str, int, Adapter]]:
    """Site, first rank and adapter of all that has ranks in the slots."""
    used: dict[str, int] = {}
    for adapter in shown:
        place = None if serving.board is None else serving.board.placed[adapter.name]
        for site, value in adapter.lowered.items():
            if rank := value.d.numel():
                yield site, used.get(site, 0) if place is None else place.start, adapter
                used[site] = used.get(site, 0) + rank
