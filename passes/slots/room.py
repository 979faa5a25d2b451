"""One piece of memory for many tensors: neighbours are copied together, and a pickle has the piece once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Room:
    """Pieces of memory, flat, that tensors lie in. They are no views of it: each has a version counter of its own."""

    def __init__(self, pieces: Iterable[Tensor] = ()) -> None:
        self.pieces = list(pieces)

    def span(self, tensor: Tensor | None) -> Span | None:
        """Where a tensor lies here; ``None``: it doesn't."""
        if type(tensor) is Tensor and not tensor.is_meta and not tensor.is_neg():
            start = tensor.untyped_storage().data_ptr()
            for number, piece in enumerate(self.pieces):
                if start and start == piece.data_ptr() and piece.dtype is tensor.dtype:
                    return Span(self, number, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
        return None


class Span(NamedTuple):
    """A tensor's place in a room, to be pickled for it."""

    room: Room
    piece: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor there."""
        return at(self.room.pieces[self.piece], self.offset, self.shape, self.stride)


def at(memory: Tensor, offset: int, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A tensor in another one's memory that is no view of it."""
    empty = torch.empty(0, dtype=memory.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, tuple(shape), tuple(stride))


def lay_out(
    wanted: Iterable[tuple[Sequence[int], torch.dtype, torch.device]], *, align: int = 64, pin: bool = False
) -> tuple[Room, list[Tensor]]:
    """Contiguous tensors of zeros, those of one dtype and device side by side in this order.

    Args:
        wanted: shape, dtype and device of each. align: bytes that every one's place is a multiple of.
        pin: in pages that stay, from which an accelerator copies by itself.
    """
    wanted, ends, offsets = list(wanted), dict[tuple[torch.dtype, torch.device], int](), []
    for shape, dtype, device in wanted:
        step = align // dtype.itemsize
        offsets.append(ends.get((dtype, device), 0))
        ends[dtype, device] = offsets[-1] + -(-prod(shape) // step) * step
    pieces = {key: torch.zeros(end, dtype=key[0], device=key[1], pin_memory=pin) for key, end in ends.items()}
    made = []
    for (shape, dtype, device), offset in zip(wanted, offsets, strict=True):
        if device.type == "meta":
            made.append(torch.zeros(tuple(shape), dtype=dtype, device=device))
        else:
            strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
            made.append(at(pieces[dtype, device], offset, shape, strides))
    return Room(piece for piece in pieces.values() if not piece.is_meta), made
