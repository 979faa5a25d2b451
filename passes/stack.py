"""A stack of several slots' A's for a graph that :class:`~fxpeft.passes.GroupPass` made, always what the slots hold."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fxpeft.passes.slot import slot_of

_refill = threading.Lock()


class Stack:
    """``[max_rank, sites, in]``: a copy of the sites' A's, made anew for the ranks in use where they were written.

    A slot's A knows how often it was written (torch's version counter), so whoever writes slots need not
    know of stacks: a swap costs the same with them, and the first forward after it copies. A forward
    keeps swaps out, so it finds either the versions of its own adapter or makes them.

    Args:
        sources: the sites' A's, ``[max_rank, in]`` each, of one dtype on one device.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.sources = tuple(sources)
        first = sources[0]
        with torch.inference_mode(False):  # outside of it nothing could be copied into a tensor made inside
            shape = (first.shape[0], len(sources), *first.shape[1:])
            self.tensor = torch.zeros(shape, dtype=first.dtype, device=first.device)
        self._holds: tuple[tuple[int, ...], int] = (), 0  # the versions that were copied, and of how many ranks

    def of(self, sources: Sequence[Tensor]) -> bool:
        """Whether this is the stack of these very tensors, in this order."""
        return len(sources) == len(self.sources) and all(a is b for a, b in zip(sources, self.sources, strict=True))

    def refreshed(self, rank: int) -> Tensor:
        """The stack; its first ``rank`` ranks are those of the sources."""
        versions = tuple(source._version for source in self.sources)
        held, ranks = self._holds
        if versions != held or ranks < rank:
            with _refill, torch.no_grad():
                held, ranks = self._holds
                if versions != held or ranks < rank:
                    rank = max(rank, ranks) if versions == held else rank
                    for number, source in enumerate(self.sources):
                        self.tensor[:rank, number].copy_(source[:rank])
                    self._holds = versions, rank
        return self.tensor


def stack_of(sources: Sequence[Tensor]) -> Tensor:
    """The stack of slots' A's, kept by the first one's slot; of tensors that no slot has, a new one."""
    slot = slot_of(sources[0])
    if slot is None:
        return torch.stack(tuple(sources), 1)
    found = next((stack for stack in slot.stacks if stack.of(sources)), None)
    if found is None:
        with _refill:
            found = next((stack for stack in slot.stacks if stack.of(sources)), None)
            if found is None:
                found = Stack(sources)
                # those of A's that are the slot's no longer (``.to(device)``) go with this
                slot.stacks = (*(s for s in slot.stacks if all(slot_of(a) for a in s.sources)), found)
    return found.refreshed(sources[0].shape[0] if slot.rank is None else slot.rank.rank)
