"""Finished adapters into a model, and which of them take part in the forward."""

from __future__ import annotations

from torch import nn

from fxpeft.adapters.attach import attach, check_together, detach, hosts, rebind, set_trainable
from fxpeft.adapters.change import changes
from fxpeft.adapters.gathering import check_trained
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.penalty import watch_loss
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter, ModelState, ensure_state, find_state
from fxpeft.errors import AdapterError
from fxpeft.model.modules import Modules
from fxpeft.passes.base import PassError


def check_name(model: nn.Module, name: str) -> str:
    """A name that an adapter can have (:func:`fxpeft.adapters.name.check_adapter_name`) and that is not taken."""
    check_adapter_name(name)
    state = find_state(model)
    if state is not None and name in state.adapters:
        raise AdapterError(f"there is an adapter named {name!r} already; delete_adapter it, or replace it with hotswap")
    return name


@changes
def install_adapter(model: nn.Module, adapter: Adapter, modules: Modules | None = None) -> None:
    """Put a finished adapter into the model and make it the active one.

    Args:
        modules: the model's, where they were walked before.
    """
    state = find_state(model)
    if state is not None and state.serving is not None:
        state.serving.install(model, state, adapter)
        return
    check_trained(model, [adapter])
    running = [] if state is None else [state.adapters[name] for name in state.active]
    touched, frozen = hosts(model, [adapter, *running]), list[nn.Parameter]()
    if state is None:
        modules = modules or Modules(model)
        frozen += (p for module in modules.values() for p in module._parameters.values() if p is not None)
    try:
        with restoring(model, [adapter, *running], touched.values(), frozen):
            state = ensure_state(model, modules)
            attach(model, adapter)
            state.adapters[adapter.name] = adapter
            switch(model, state, [adapter.name], state.enabled)
    except PassError as error:
        raise AdapterError(str(error)) from None


@changes
def replace_attached(model: nn.Module, state: ModelState, new: Adapter) -> None:
    """Put an adapter in the place of an attached one of the same name; on an error the old one is back."""
    old = state.get(new.name)
    touched = hosts(model, [old, new])
    check_trained(model, [new] if new.name in state.active and state.enabled else [])
    check_together([new if name == new.name else state.adapters[name] for name in state.active])
    with restoring(model, [old, new], touched.values()):
        detach(model, old)
        attach(model, new)
        state.adapters[new.name] = new
        rebind(model, touched, state.running())
        set_trainable(state, [new.name])
        watch_loss(model, state)


def switch(model: nn.Module, state: ModelState, names: list[str], enabled: bool) -> None:
    """Rebind the modules of the adapters that come or go; on an error everything is bound as before."""
    old, old_enabled = state.active, state.enabled
    check_trained(model, [state.adapters[name] for name in names if enabled and name in state.adapters])
    named = [name for name, adapter in state.adapters.items() if adapter.trained is not None]
    changed = [state.adapters[n] for n in dict.fromkeys((*old, *names, *named)) if n in state.adapters]
    touched = hosts(model, [adapter for adapter in changed if adapter.name in (*old, *names)])
    with restoring(model, changed, touched.values()):
        state.active, state.enabled = names, enabled
        rebind(model, touched, state.running())
        if enabled == old_enabled:  # adapters were chosen, not switched off or on
            for name in named:
                state.note(state.adapters[name])
                state.adapters[name].trained = None
        set_trainable(state, (*old, *names, *named))
        watch_loss(model, state)
