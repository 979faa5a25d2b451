"""Changes of a model's adapters: records and slots together, all or nothing, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from fxpeft.adapters.state import Host, ModelState, find_state
from fxpeft.errors import AdapterError
from fxpeft.model.wrappers import unwrap

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def ordinary() -> Iterator[None]:
    """Make ordinary tensors, whatever mode the caller is in: one made in inference mode can't be written outside."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # the first alone would switch gradients on
        yield


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Change a model's adapters. On a prepared one nobody computes or swaps meanwhile; it may be inside another change.

    After an error, whichever and wherever, records and slots are what they were: at once, or, where that fails
    too, before anybody reads them next.

    Raises:
        LockError: inside a forward of the same thread. LockTimeout: others computed for too long.
        AdapterError: inside of a ``with rows(...)`` block of a model without slots.
    """
    model = unwrap(model)
    with ordinary():
        state = find_state(model)
        while state is not None and (serving := state.serving) is not None:
            with serving.lock.write():
                if find_state(model) is not state or state.serving is not serving:
                    state = find_state(model)  # somebody released the slots while this thread waited
                    continue
                if serving.lock.repair is not None:  # part of a larger change
                    yield
                    return
                serving.lock.repair = _undo(model, state, serving)
                yield
                serving.lock.repair = None
                return
        if state is not None and state.apart:
            raise AdapterError(
                "adapters can't be changed while rows are named on a model without slots: leave the block, "
                "or, after a call that Ctrl-C broke off, call the model once"
            )
        yield


def changes(function: Callable[P, T]) -> Callable[P, T]:
    """Let the whole of a function be one change of the model that it takes first."""

    @functools.wraps(function)
    def change(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)  # which says what is wrong
        with changing(model):
            return function(*args, **kwargs)

    return change


def _undo(model: nn.Module, state: ModelState, serving: Host) -> Callable[[], None]:
    adapters, active, show_again = dict(state.adapters), list(state.active), serving.undo(model)
    others = state.enabled, state.folded, state.baked

    def undo() -> None:
        with ordinary():
            state.adapters, state.active = dict(adapters), list(active)
            state.enabled, state.folded, state.baked = others
            show_again()
        serving.lock.repair = None

    return undo
