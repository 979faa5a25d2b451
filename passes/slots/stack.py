"""A stack of several slots' A's for a graph that :class:`~fxpeft.passes.GroupPass` made, always what the slots hold."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from fxpeft.passes.slots.slot import ActiveRank, slot_of
from fxpeft.passes.torch_private import version_of

_writing = threading.Lock()


def _free_in_child() -> None:
    global _writing
    _writing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


class Stack:
    """``[max_rank, sites, in]``: a copy of the sites' A's, made anew for the ranks in use where they were written.

    A slot's A knows how often it was written (torch's version counter), so whoever writes slots need not
    know of stacks: a swap costs the same with them, and the first forward after it copies. A forward
    keeps swaps out, so it finds the versions of its own adapter, or copies them.

    Args:
        sources: the sites' A's, ``[max_rank, in]`` each, of one dtype on one device.
        rank: the active rank; ``None``: all of them may be in use, as in static mode.
    """

    def __init__(self, sources: Sequence[Tensor], rank: ActiveRank | None) -> None:
        self.sources, self.rank = tuple(sources), rank
        first = sources[0]
        shape = (first.shape[0], len(sources), *first.shape[1:])
        with torch.inference_mode(False):  # outside of it nothing could be copied into a tensor made inside
            self.tensor = torch.zeros(shape, dtype=first.dtype, device=first.device)
        self._holds: tuple[tuple[int, ...], int] = (), 0  # the versions that were copied, and of how many ranks

    def of(self, sources: Sequence[Tensor]) -> bool:
        """Whether this is the stack of these very tensors, in this order."""
        return len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources))

    def refreshed(self) -> Tensor:
        """The stack; its active ranks are those of the sources."""
        versions, rank = tuple(map(version_of, self.sources)), self.rank.rank if self.rank else len(self.tensor)
        held, ranks = self._holds
        if versions != held or ranks < rank:
            with _writing, torch.no_grad():
                held, ranks = self._holds  # another forward of the same adapter may have been first
                if versions != held or ranks < rank:
                    for number, source in enumerate(self.sources):
                        self.tensor[:rank, number].copy_(source[:rank])
                    self._holds = versions, rank
        return self.tensor


def stack_of(sources: Sequence[Tensor], known: MutableMapping[int, Stack]) -> Tensor:
    """The stack of slots' A's, kept by the first one's slot; of tensors that no slot has, a new one each time.

    Args:
        known: those that the caller got before; finding a slot by its tensor costs more than all the rest here.
    """
    first = id(sources[0])
    stack = known.get(first)
    if stack is None or not stack.of(sources):
        slot = slot_of(sources[0])
        if slot is None:
            return torch.stack(tuple(sources), 1)
        with _writing:
            stack = next((s for s in slot.stacks if s.of(sources)), None)
            if stack is None:
                # rows that are named read ranks behind those of the active adapters
                stack = Stack(sources, slot.rank if slot.lanes is None else None)
                # those of A's that no slot has any longer (``.to(device)``) go with this
                slot.stacks = (*(s for s in slot.stacks if all(slot_of(a) for a in s.sources)), stack)
        known[first] = stack
    return stack.refreshed()
