"""Copies between fixed tensors, prepared once so that running them costs little more than the bytes."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.passes.slots.room import at
from fxpeft.passes.torch_private import copy_each

Pair = tuple[Tensor, Tensor]


class Copies:
    """``to.copy_(source)`` for pairs of equal shape, as often as wanted. Nothing may need a gradient.

    Pairs that lie in equal steps on both sides, as those of an adapter and of slots in one room each do, are
    one copy. Memory of the CPU that lies alone is moved as such: at the size of an adapter's factors the checks and
    set-up of a torch copy cost more than the bytes (168 tensors, 15 MB: 2.7 ms; moved: 1.1 ms; one copy of as
    many bytes: 1.0 ms). The rest, transposes for instance, is too small for torch to split over
    threads, so the list is. The tensors are kept, so their memory is; where a tensor has other memory
    now (``.data =``, ``set_``, ``swap_tensors``) the copies are prepared anew.

    Args:
        written: the tensors that the pairs write parts of, where the caller sees to it that all memory stays where it
            is: looking at hundreds of tensors that no cache holds any more costs as much as many of their bytes.
        join: look for neighbours, and for what goes to a device together, which takes longer than the copies do once.
    """

    def __init__(self, pairs: Iterable[Pair], written: Sequence[Tensor] | None = None, *, join: bool = True) -> None:
        self.pairs, self.written, self.join = list(pairs), written, join
        self._prepare()

    def _prepare(self) -> None:
        self.moves: list[tuple[int, int, int]] = []
        moved: list[Tensor] = []
        self.others: list[Pair] = []
        self.sent: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, list[Pair]]] = {}
        self.arrived: list[Pair] = []
        for run in _runs(self.pairs) if self.join else ([pair] for pair in self.pairs):
            to, source = run[0]
            if len(run) > 1:
                to, source = _joined(run)
                moved += [to for to, _ in run]
            if self.join and source.is_cpu and not to.is_cpu and type(source) is Tensor:
                memory = source.untyped_storage()
                key = to.device, source.dtype, memory.data_ptr()
                whole = at(source, 0, (memory.nbytes() // source.itemsize,), (1,))
                self.sent.setdefault(key, (whole, []))[1].append((to, source))
            elif len(run) > 1:
                self.others.append((to, source))
            elif _is_plain(to) and _is_plain(source) and to.dtype is source.dtype and to.shape == source.shape:
                self.moves.append((to.data_ptr(), source.data_ptr(), to.nbytes))
                moved.append(to)
            elif source.dim() == 2 and source.stride(0) == 1 != source.stride(1):
                self.others.append((to.t(), source.t()))  # torch reads in order then, and that is a third faster
            else:
                self.others.append((to, source))
        looked_at = self.pairs if self.written is None else ()
        self.placed = [t for pair in looked_at for t in pair if type(t) in (Tensor, nn.Parameter)]
        self.addresses = list(map(_address, self.placed))
        # a backward that saved the old values has to notice; tensors of inference mode are in none
        self.counted = [to for to in self.written or moved if not to.is_inference()]

    def stage(self) -> None:
        """Begin the copies from the host to devices: a piece of memory goes there whole, and from there to its places.

        From pinned memory that is one transfer, beside all else that the device does.
        """
        self.arrived = []
        for (device, *_), (whole, pairs) in self.sent.items():
            there = whole.to(device, non_blocking=True)
            self.arrived += [(to, at(there, int(t.storage_offset()), t.shape, t.stride())) for to, t in pairs]

    def run(self) -> None:
        """Copy everything."""
        if list(map(_address, self.placed)) != self.addresses:
            self._prepare()
        if self.sent and not self.arrived:
            self.stage()
        spread = len(self.others) >= 32 and all(to.is_cpu for to, _ in self.others)
        count = torch.get_num_threads() if spread else 1
        running: list[Future[None]] = []
        try:
            for i in range(1, count):
                running.append(_copiers().submit(_copy, self.others[i::count]))
            for to, source, size in self.moves:
                ctypes.memmove(to, source, size)
            torch.autograd.graph.increment_version(self.counted)
            _copy(self.others[::count])
            _copy(self.arrived)
        finally:
            self.arrived = []
            _finish(running)
        for part in running:
            part.result()


def _finish(running: list[Future[None]]) -> None:
    """Wait, whatever comes: who goes on while a thread still writes may write to the same places."""
    interrupt: BaseException | None = None
    while not all(part.done() for part in running):
        try:
            wait(running)
        except BaseException as error:  # noqa: BLE001 - raised below
            interrupt = error
    if interrupt is not None:
        raise interrupt


_address = Tensor.data_ptr


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its bytes in the machine's memory."""
    return type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def _runs(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs, those together that lie in equal steps in one piece of memory on each side."""
    alike: dict[Any, list[tuple[int, int, Pair]]] = {}
    for pair in pairs:
        to, source = pair
        if to.shape != source.shape or not all(type(t) is Tensor and not t.is_neg() and t.data_ptr() for t in pair):
            alike[len(alike)] = [(0, 0, pair)]
            continue
        key = to.shape, *((t.stride(), t.dtype, t.device, t.untyped_storage().data_ptr()) for t in pair)
        alike.setdefault(key, []).append((int(to.storage_offset()), int(source.storage_offset()), pair))
    runs = []
    for found in alike.values():
        found.sort(key=operator.itemgetter(0))
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(found)]
        start = 0
        for end in range(1, len(found) + 1):
            if end == len(found) or steps[end - 1] != steps[start] or min(steps[end - 1]) <= 0:
                runs.append([pair for *_, pair in found[start:end]])
                start = end
    return runs


def _joined(run: list[Pair]) -> Pair:
    """One copy in the place of several that lie in equal steps: ``[count, *shape]`` of each side."""
    sides = []
    for first, second in zip(*run[:2], strict=True):
        step = second.storage_offset() - first.storage_offset()
        sides.append(at(first, first.storage_offset(), (len(run), *first.shape), (step, *first.stride())))
    return sides[0], sides[1]


@torch.no_grad()
def _copy(pairs: list[Pair]) -> None:
    if pairs:
        copy_each([to for to, _ in pairs], [source for _, source in pairs])  # one call: no lock between


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="fxpeft-copy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_copiers.cache_clear)  # threads don't live on in a child
