"""Serving adapters that act from an invocation's tokens on: which tokens of a call those in the slots act on."""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fxpeft.adapters.invocation import FAR, Call, Tokens, cache_in, mark, mask_of, seen_in
from fxpeft.adapters.lock import SwapLock
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.passes.slots.reach import LaneReach, ThreadReach, everywhere, nowhere
from fxpeft.passes.torch_private import skip_frame
from fxpeft.serving.staging import StreamOrder


class Shows(Protocol):
    """What shows adapters in slots."""

    shown: list[Adapter]
    order: StreamOrder | None
    board: Any

    @property
    def lock(self) -> SwapLock: ...


class RowStarts(NamedTuple):
    """From what on the ranks of named rows act.

    ``packed``: ``[rows, r]``, and ``own``: ``[rows, w]``, as those of :class:`LaneReach`: 0, everywhere, or the number
    of one of the ``invocations``, from 1 on.
    """

    invocations: Sequence[Tokens]
    packed: Tensor
    own: Tensor


class SlotReach:
    """Finds for each call of a prepared model which of its tokens the adapters in the slots act on.

    Args:
        serving: whose slots.

    ``calls``: what the slots read where no rows are named.
    """

    def __init__(self, serving: Shows) -> None:
        self.serving, self.calls = serving, ThreadReach()

    def enter(self, call: Call) -> None:
        """A thread calls the model."""
        self.calls.told, self.calls.tokens = call, None
        board = self.serving.board
        if board is None:
            self.find()
        elif self.serving.lock.reads(get_ident()):  # else it does so next, and the places stay as they are meanwhile
            board.sync()

    def before_read(self) -> None:
        """Part of every forward that holds the lock: a swap may have come since."""
        if self.serving.order is not None:
            self.serving.order.before_read()
        self.find()

    def find(self) -> None:
        """Let the slots have which tokens the active adapters act on."""
        reach, tokens = self.calls, invocation_of(self.serving.shown)
        if reach.told is None:  # a part of the model is called by itself
            if reach.mask.shape[0] or (reach.mask.shape[1] == 1) is not bool(tokens):
                reach.mask = nowhere() if tokens else everywhere()
        elif tokens != reach.tokens:
            (reach.mask, _), reach.kept = mask_of(reach.told, tokens), reach.told.kept
            reach.tokens = tokens

    def of_rows(self, begins: RowStarts, repeats: int) -> LaneReach:
        """From which tokens of this thread's call on the ranks of its rows act.

        Args:
            begins: of the rows that are named. repeats: how many rows of the call each may stand for.
        """
        call: Call | None = self.calls.told
        device, (rows, _) = begins.packed.device, begins.packed.shape
        count = rows if call is None or not call.sizes else call.sizes[0]
        known = call is not None and bool(call.sizes) and count in (rows, rows * repeats)
        count = count if known else rows
        starts = torch.zeros(count, 1 + len(begins.invocations), dtype=torch.long, device=device)
        for number, tokens in enumerate(begins.invocations, 1):
            seen = seen_in(call, tokens) if known and call is not None else None
            starts[:, number] = FAR if seen is None else seen.starts
        packed, own = (
            starts.gather(1, each.repeat_interleave(count // rows, 0)) for each in (begins.packed, begins.own)
        )
        if call is None or not known:
            return LaneReach(packed, own, torch.zeros((), dtype=torch.long, device=device))
        return LaneReach(packed, own, call.places().to(device), call.kept)

    def leave(self, output: Any) -> None:
        """The call has ended; a cache that it made itself is marked."""
        if self.calls.told is not None and self.calls.told.cache is None:
            for tokens, seen in self.calls.told.found.items():
                mark(cache_in(output), tokens, seen)
        self.calls.clear()


skip_frame(SlotReach.before_read, deep=True)  # Dynamo begins behind it


def invocation_of(adapters: Sequence[Adapter]) -> Tokens:
    """The tokens from which on the adapters in the slots act; none: they act on all."""
    return next((tokens for a in adapters if (tokens := method_of(a.config).invocation(a.config))), ())


def check_invocations(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters together that don't act on the same tokens: a slot's ranks all do.

    Raises:
        AdapterError: they don't.
    """
    found = {a.name: method_of(a.config).invocation(a.config) for a in adapters}
    if len(set(found.values())) > 1:
        lines = (f"{name}: {f'from {list(tokens)} on' if tokens else 'all'}" for name, tokens in found.items())
        raise AdapterError(
            f"these adapters can't share a slot, since they don't act on the same tokens: {'; '.join(lines)}\n"
            "set one of them active, or release_hotswap(model) to run them together"
        )
