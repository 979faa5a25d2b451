"""Serving adapters that act from an invocation's tokens on: which tokens of a call those in the slots act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fxpeft.adapters.invocation import Call, Tokens, cache_in, mark, mask_of
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.passes.slots.reach import ThreadReach, everywhere, nowhere
from fxpeft.passes.torch_private import skip_frame
from fxpeft.serving.staging import StreamOrder


class Shows(Protocol):
    """What shows adapters in slots."""

    shown: list[Adapter]
    order: StreamOrder | None


class SlotReach:
    """Finds for each call of a prepared model which of its tokens the adapters in the slots act on.

    Args:
        serving: whose slots.

    ``calls``: what the slots read.
    """

    def __init__(self, serving: Shows) -> None:
        self.serving, self.calls = serving, ThreadReach()

    def enter(self, call: Call) -> None:
        """A thread calls the model."""
        self.calls.told, self.calls.tokens = call, None
        self._find()

    def before_read(self) -> None:
        """Part of every forward that holds the lock: a swap may have come since."""
        if self.serving.order is not None:
            self.serving.order.before_read()
        self._find()

    def _find(self) -> None:
        reach, tokens = self.calls, _invocation(self.serving.shown)
        if reach.told is None:  # a part of the model is called by itself
            if reach.mask.shape[0] or (reach.mask.shape[1] == 1) is not bool(tokens):
                reach.mask = nowhere() if tokens else everywhere()
        elif tokens != reach.tokens:
            reach.mask, reach.seen = mask_of(reach.told, tokens)
            reach.tokens = tokens
            mark(reach.told.cache, tokens, reach.seen)

    def leave(self, output: Any) -> None:
        """The call has ended; a cache that it made itself is marked."""
        if self.calls.told is not None and self.calls.told.cache is None and self.calls.tokens:
            mark(cache_in(output), self.calls.tokens, self.calls.seen)
        self.calls.clear()


skip_frame(SlotReach.before_read, deep=True)  # Dynamo begins behind it


def _invocation(adapters: Sequence[Adapter]) -> Tokens:
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
