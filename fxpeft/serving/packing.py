"""An adapter's slot values in memory of its own, side by side as the slots lie: showing it is a handful of copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter

from torch import Tensor

from fxpeft.adapters.state import Adapter
from fxpeft.methods import method_of
from fxpeft.methods.base import SlotValues
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.room import Room, lay_out
from fxpeft.passes.slots.slot import Slot


def settle(adapter: Adapter, slots: Mapping[str, Slot]) -> Adapter:
    """Give an adapter contiguous memory of its own.

    Neither a file that is written over nor a caller's tensor that is changed later can reach it. The adapter's values
    become views of the slot values where they can, so that it is in memory once.
    """
    method, values = method_of(adapter.config), adapter.values
    own, room = pack(adapter.lowered, slots, adapter.room)
    sites = {site: method.keep(adapter.plan.sites[site], values.sites[site], own[site]) for site in own}
    adapter.values = values.clone() if method.unlowered else replace(values.clone(sites=False), sites=sites)
    adapter.lowered, adapter.room, adapter.copies, adapter.settled = own, room, None, True
    return adapter


def pack(
    lowered: Mapping[str, SlotValues], slots: Mapping[str, Slot], before: Room | None
) -> tuple[dict[str, SlotValues], Room]:
    """Copies of slot values that lie in the order of the slots' memory, and the room where they do.

    Args:
        before: what lies there already stays: the factors of an adapter whose scale is another now.
    """
    own = {site: {"a": v.a, "b": v.b, "d": v.d, **v.features()} for site, v in lowered.items()}
    found, kept = list[tuple[int, str, str, Tensor]](), set[int]()
    for site, parts in own.items():
        places = slots[site]._buffers
        for name, value in parts.items():
            span = None if before is None or not value.is_contiguous() else before.span(value)
            if span is not None:
                kept.add(span.piece)
            else:
                place = places.get(name)
                found.append((0 if place is None else place.data_ptr(), site, name, value))
    found.sort(key=itemgetter(0))
    room, made = lay_out([(value.shape, value.dtype, value.device) for *_, value in found], align=16)
    Copies((to, value) for to, (*_, value) in zip(made, found, strict=True)).run()
    for to, (_, site, name, _) in zip(made, found, strict=True):
        own[site][name] = to
    room.pieces += [before.pieces[number] for number in sorted(kept)] if before is not None else []
    return {site: SlotValues(**parts) for site, parts in own.items()}, room
