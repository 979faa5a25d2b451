"""What was put in is taken out: the slots, or everything."""

from __future__ import annotations

from torch import nn

from fxpeft.adapters.attach import attach, detach, hosts, rebind, set_trainable
from fxpeft.adapters.change import changes
from fxpeft.adapters.gathering import check_trained
from fxpeft.adapters.inplace import exchange
from fxpeft.adapters.penalty import unwatch_loss, watch_loss
from fxpeft.adapters.restore import restoring, writing
from fxpeft.adapters.state import ModelState, drop_state, state_of
from fxpeft.adapters.values import placed
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import attribute
from fxpeft.passes.live import unbind
from fxpeft.serving.base_loads import unwatch_loads
from fxpeft.serving.binding import unbind_slots
from fxpeft.serving.guard import unguard_forwards
from fxpeft.serving.swap import Serving, serving_of


@changes
def remove(model: nn.Module) -> None:
    """Take everything out of the model that fxpeft put in: it is then what it was before.

    Classes, ``state_dict``, ``requires_grad`` and outputs are bit-identical to the bare model's. Folded
    adapters are unfolded; only what was folded with ``keep=None`` stays in the weights.
    """
    model, state = unwrap(model), state_of(model)
    if state.serving is not None:
        serving_of(state).check_unnamed()
    bare = {} if state.folded is None else state.folded.bare(model)
    with restoring(model, state.adapters.values()), writing([attribute(model, path) for path in bare]):
        if state.serving is not None:
            release_slots(model, state, serving_of(state))
        else:
            for adapter in state.adapters.values():
                for module in hosts(model, [adapter]).values():
                    unbind(module)
                detach(model, adapter)
        exchange(model, bare)
        unwatch_loss(model)
        drop_state(model)
        unguard_forwards(model)


@changes
def release_hotswap(model: nn.Module) -> None:
    """Take the slots out again. The adapters stay, at their own ranks and trainable as before.

    Raises:
        AdapterError: one that is to be trained would come into modules that FSDP has parted, or a block names rows;
            nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    serving = serving_of(state)
    serving.check_unnamed()
    check_trained(model, state.running())
    with restoring(model, state.adapters.values()):
        leave_slots(model, state, serving)
        if not state.adapters:
            drop_state(model)
        unguard_forwards(model)


def leave_slots(model: nn.Module, state: ModelState, serving: Serving) -> None:
    """From slots back to the adapters' own parameters."""
    release_slots(model, state, serving)
    for adapter in state.adapters.values():
        if not adapter.parts:
            if adapter.settled:  # one piece of memory, which parameters must not share, and on whatever device
                adapter.values = placed(model, adapter.values, autocast=False)
            adapter.room, adapter.settled = None, False
            attach(model, adapter)
    rebind(model, hosts(model, state.adapters.values()), state.running())
    set_trainable(state)
    watch_loss(model, state)


def release_slots(model: nn.Module, state: ModelState, serving: Serving) -> None:
    """Drop the slots; every module has its own forward again, and is still locked."""
    serving.lock.repair = None
    unbind_slots(model, serving)
    unwatch_loads(model)
    state.serving = None
    for adapter in state.adapters.values():
        adapter.lowered, adapter.copies, adapter.prompt = {}, None, None
