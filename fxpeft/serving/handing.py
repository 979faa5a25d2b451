"""From a checkpoint to an adapter that a prepared model has beside its others, and out again, beside forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fxpeft.adapters.change import changing, ordinary
from fxpeft.adapters.loading import load
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.checkpoint import Checkpoint, for_model
from fxpeft.errors import AdapterError, listing
from fxpeft.model.modules import Modules
from fxpeft.serving.board import Named
from fxpeft.serving.lowering import lower
from fxpeft.serving.packing import settle
from fxpeft.serving.rows import check_named
from fxpeft.serving.swap import serving_of


@ordinary()
@torch.no_grad()
def build(model: nn.Module, name: str, found: Checkpoint) -> Adapter:
    """An adapter for a prepared model, with slot values in memory of its own. The model is read, not touched.

    Raises:
        AdapterError: it doesn't fit, or brings what rows can't have each of their own.
    """
    serving = serving_of(state_of(model))
    modules = Modules(model)
    found = for_model(modules, found)
    found.config.inference_mode = True
    plan, values = load(modules, found)
    adapter = lower(model, serving, Adapter(name, plan, values))
    if serving.board is not None:
        serving.board.check_rows_take(adapter)
    return settle(adapter, serving.slots)


def hand_over(model: nn.Module, new: Iterable[Adapter], gone: Iterable[Adapter]) -> None:
    """Give the model what is new and take from it what nobody uses: the one thing that waits for forwards.

    Raises:
        LockTimeout, LockError: it can't be; nothing was changed.
    """
    with changing(model):
        state = state_of(model)
        names = {adapter.name for adapter in gone}
        for name in names:
            state.adapters.pop(name, None)
        if (board := serving_of(state).board) is not None:
            board.drop(names)
        state.adapters.update({adapter.name: adapter for adapter in new})


def fit(model: nn.Module, adapters: Sequence[Adapter]) -> bool:
    """Whether a batch can have all of these, by the number of lanes and ranks."""
    serving = serving_of(state_of(model))
    return serving.board is not None and serving.board.problem(serving.shown, adapters, serving.max_rank) is None


def check_lane(model: nn.Module, lane: Mapping[str, float], adapters: Sequence[Adapter]) -> None:
    """Refuse what a row can't have, before it is in a batch with others.

    Raises:
        AdapterError: a weight or a mixture that can't be, or more ranks than all lanes have.
    """
    state = state_of(model)
    if (board := serving_of(state).board) is not None:
        check_named(state, board, Named([lane], torch.tensor([0])))
    if not fit(model, adapters):
        names = listing(f"{adapter.name}: r={adapter.config.to_dict().get('r')}" for adapter in adapters)
        raise AdapterError(f"these don't go into the slots together, having too many ranks or lanes:\n{names}")
