"""An adapter's slot values in memory of its own, side by side as the slots lie: showing it is a handful of copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from fxpeft.adapters.state import Adapter
from fxpeft.methods import method_of
from fxpeft.methods.base import SlotValues
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.room import Room, lay_out
from fxpeft.passes.slots.slot import Slot
from fxpeft.serving.staging import ACCELERATORS


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

    For slots on an accelerator that is pinned memory of the host, a piece for each device and dtype.

    Args:
        before: what lies there already stays: the factors of an adapter whose scale is another now.
    """
    own = {site: {"a": v.a, "b": v.b, "d": v.d, **v.features()} for site, v in lowered.items()}
    found = dict[torch.device, list[tuple[int, str, str, Tensor]]]()
    kept = set[int]()
    for site, parts in own.items():
        slot = slots[site]
        for name, value in parts.items():
            span = None if before is None or not value.is_contiguous() else before.span(value)
            if span is not None:
                kept.add(span.piece)
                continue
            place = slot._buffers.get(name)
            found.setdefault(slot.a.device, []).append((0 if place is None else place.data_ptr(), site, name, value))
    room = Room()
    for device, values in found.items():
        values.sort(key=itemgetter(0))
        pin = device.type in ACCELERATORS
        homes = [torch.device("cpu") if pin or device.type == "cpu" else v.device for *_, v in values]
        wanted = [(v.shape, v.dtype, home) for (*_, v), home in zip(values, homes, strict=True)]
        part, made = lay_out(wanted, align=16, pin=pin)
        Copies((to, value) for to, (*_, value) in zip(made, values, strict=True)).run()
        for to, (_, site, name, _) in zip(made, values, strict=True):
            own[site][name] = to
        room.pieces += part.pieces
    room.pieces += [before.pieces[number] for number in sorted(kept)] if before is not None else []
    return {site: SlotValues(**parts) for site, parts in own.items()}, room
