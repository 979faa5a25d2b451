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
            for number, piece in enumerate(self.pieces):
                offset = tensor.data_ptr() - piece.data_ptr()
                if piece.dtype is tensor.dtype and tensor.data_ptr() and 0 <= offset < piece.nbytes:
                    return Span(self, number, offset // piece.itemsize, tuple(tensor.shape), tensor.stride())
        return None


class Span(NamedTuple):
    """A tensor's place in a room, to be pickled for it."""

    room: Room
    piece: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, *, apart: bool = False) -> Tensor:
        """The tensor there.

        Args:
            apart: in a storage of its own over the same memory. torch refuses graphs (regions, ``invoke_subgraph``) of
                which two inputs share a storage.
        """
        memory = self.room.pieces[self.piece]
        if not apart:
            return at(memory, self.offset, self.shape, self.stride)
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        begin = self.offset * memory.itemsize
        part = memory.untyped_storage()[begin : begin + (last + 1) * memory.itemsize]
        return torch.empty(0, dtype=memory.dtype, device=memory.device).set_(part, 0, self.shape, self.stride)

    def narrow(self, start: int, count: int) -> Tensor:
        """The tensor there from ``start`` on in dimension 0."""
        offset = self.offset + start * self.stride[0]
        return self._replace(offset=offset, shape=(count, *self.shape[1:])).tensor()


def at(memory: Tensor, offset: int, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A tensor in another one's memory that is no view of it."""
    empty = torch.empty(0, dtype=memory.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, tuple(shape), tuple(stride))


def lay_out(
    wanted: Iterable[tuple[Sequence[int], torch.dtype, torch.device]],
    *,
    align: int = 64,
    pin: bool = False,
    apart: bool = False,
) -> tuple[Room, list[Tensor]]:
    """Contiguous tensors of zeros, those of one dtype and device side by side in this order.

    Args:
        wanted: shape, dtype and device of each. align: bytes that every one's place is a multiple of.
        pin: in pages that stay, from which an accelerator copies by itself. apart: as of :meth:`Span.tensor`.
    """
    wanted, ends, offsets = list(wanted), dict[tuple[torch.dtype, torch.device], int](), []
    for shape, dtype, device in wanted:
        step = align // dtype.itemsize
        offsets.append(ends.get((dtype, device), 0))
        ends[dtype, device] = offsets[-1] + -(-prod(shape) // step) * step
    pieces = {key: torch.zeros(end, dtype=key[0], device=key[1], pin_memory=pin) for key, end in ends.items()}
    numbers = {key: number for number, key in enumerate(key for key, piece in pieces.items() if not piece.is_meta)}
    room, made = Room(pieces[key] for key in numbers), []
    for (shape, dtype, device), offset in zip(wanted, offsets, strict=True):
        if device.type == "meta":
            made.append(torch.zeros(tuple(shape), dtype=dtype, device=device))
        else:
            strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
            made.append(Span(room, numbers[dtype, device], offset, tuple(shape), strides).tensor(apart=apart))
    return room, made
