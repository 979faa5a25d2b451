"""Tensors side by side in one piece of memory: each is its own, and a pickle has the piece once."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from fxpeft.passes.slots import ActiveRank, Slot
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.room import Room, lay_out
from fxpeft.passes.slots.slot import EXACT
from fxpeft.passes.targets.operations.linear import Linear

CPU = torch.device("cpu")


def test_tensors_are_apart_aligned_and_no_views() -> None:
    wanted = [((3, 5), torch.float32, CPU), ((7,), torch.bfloat16, CPU), ((3, 5), torch.float32, CPU)]
    room, (a, half, b) = lay_out(wanted)
    assert [t.shape for t in (a, half, b)] == [(3, 5), (7,), (3, 5)]
    assert [t.dtype for t in room.pieces] == [torch.float32, torch.bfloat16]
    assert b.data_ptr() - a.data_ptr() == 64
    assert not any(t._is_view() or t.any() for t in (a, half, b))
    version = b._version
    a.fill_(1)
    assert not b.any()
    assert b._version == version
    for tensor in (a[1:], half, b.t()):
        span = room.span(tensor)
        assert span is not None
        assert torch.equal(span.tensor(), tensor)
        assert span.tensor().data_ptr() == tensor.data_ptr()
    assert room.span(torch.zeros(3, 5)) is None
    assert room.span(half.view(torch.int16)) is None


def test_apart_each_has_a_storage_of_its_own_over_the_same_memory() -> None:
    wanted = [((3, 5), torch.float32, CPU), ((7,), torch.bfloat16, CPU), ((3, 5), torch.float32, CPU)]
    room, tensors = lay_out(wanted, apart=True)
    places = [
        (t.data_ptr() - room.pieces[n].data_ptr(), t.untyped_storage().nbytes())
        for t, n in zip(tensors, (0, 1, 0), strict=True)
    ]
    assert places == [(0, 60), (0, 14), (64, 60)]
    tensors[2].copy_(torch.arange(15.0).view(3, 5))
    span = room.span(tensors[2])
    assert span is not None
    assert torch.equal(span.tensor(), tensors[2])
    assert torch.equal(span.narrow(1, 2), tensors[2][1:])
    kept = tensors[2]
    del room, tensors, span
    assert kept.sum() == 105  # the memory stays as long as one of them


def made(count: int, max_rank: int = 6) -> list[Slot]:
    """Slots of one room."""
    kind, rank = Linear(11, 7), ActiveRank(max_rank)
    shapes = Slot.shapes(kind, max_rank, ("shift", "g_out"))
    order = [(site, name) for name in shapes for site in range(count)]
    room, tensors = lay_out(
        ((shapes[n], torch.float32 if n in EXACT else torch.bfloat16, CPU) for _, n in order), apart=True
    )
    memory = dict(zip(order, tensors, strict=True))
    return [
        Slot(kind, max_rank, rank, features=("shift", "g_out"), memory=(room, {n: memory[site, n] for n in shapes}))
        for site in range(count)
    ]


def test_a_pickle_of_slots_has_their_room_once_and_the_copies_share_one() -> None:
    slots = made(30, 64)
    for number, slot in enumerate(slots):
        for buffer in slot.buffers():
            buffer.fill_(number)
    size = sum(piece.nbytes for piece in slots[0].room.pieces)  # type: ignore[union-attr]
    pickled = pickle.dumps(slots)
    assert len(pickled) < 1.5 * size + 100_000
    for twins in (copy.deepcopy(slots), pickle.loads(pickled)):
        assert len({id(twin.room) for twin in twins}) == 1
        slots[3].a.fill_(-1)
        twins[4].b.fill_(-2)
        assert [float(twin.a[0, 0]) for twin in twins] == list(range(30))
        assert float(slots[4].b[0, 0]) == 4
        twins[4].b.fill_(4)
        slots[3].a.fill_(3)
        pairs = [(twin.window(0, 2)[0], slot.window(0, 2)[0]) for twin, slot in zip(twins, slots, strict=True)]
        assert len(Copies(pairs).others) == 1


def test_a_slot_that_moves_leaves_the_room_and_its_scales_stay_where_they_are() -> None:
    first, second = made(2)
    room, place = first.room, first.d.data_ptr()
    assert isinstance(room, Room)
    first.to(torch.bfloat16)
    assert first.room is room
    first.float()
    assert first.a.dtype is torch.float32
    assert first.d.data_ptr() == place  # float32 before and after
    first.to("meta")
    assert first.room is None
    assert second.room is room
    assert all(isinstance(b, Tensor) and room.span(b) for b in second._buffers.values())
