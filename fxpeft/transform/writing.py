"""Weights into a base, and the adapters that take part from then on, as one change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxpeft.adapters.inplace import exchange, put_back, values_at
from fxpeft.adapters.installing import switch
from fxpeft.adapters.state import ModelState
from fxpeft.serving.lowering import lower_again
from fxpeft.serving.swap import serving_of


def write_and_run(
    model: nn.Module, state: ModelState, writes: Mapping[str, Tensor], active: list[str]
) -> dict[str, Tensor]:
    """Write and activate as one swap, all or nothing; returns what was there."""
    if state.serving is None:
        before = exchange(model, writes)
        try:
            _run(model, state, active)
        except BaseException:
            exchange(model, before)
            raise
        return before
    serving = serving_of(state)
    serving.check_unnamed()
    records = serving.lock.repair

    def undo() -> None:
        put_back(model, before)
        serving.torn = True  # the slots' copies of the base may be of what was written
        serving.lock.repair = records
        if records is not None:
            records()

    before = values_at(model, writes)
    serving.lock.repair = undo
    exchange(model, writes)
    _run(model, state, active)
    return before


def _run(model: nn.Module, state: ModelState, active: list[str]) -> None:
    """Let these adapters take part in the forward of a base whose weights were written."""
    if state.serving is None:
        switch(model, state, active, state.enabled)
        return
    serving = serving_of(state)
    serving.holds = {}  # copies of the base's modules and biases are out of date
    lower_again(state)
    serving.activate(model, state, [state.adapters[n] for n in active] if state.enabled else [])
    state.active = active
