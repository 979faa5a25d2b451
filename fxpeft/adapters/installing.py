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
    running: list[Adapter] = []
    named: list[Adapter] = []
    frozen: list[nn.Parameter] = []
    if state is not None:
        running, named = [state.adapters[name] for name in state.active], _named(state)
    else:
        modules = modules or Modules(model)
        frozen += (p for module in modules.values() for p in module._parameters.values() if p is not None)
    touched = hosts(model, [adapter, *running])
    try:
        with restoring(model, [adapter, *running, *named], touched.values(), frozen):
            state = ensure_state(model, modules)
            attach(model, adapter)
            state.adapters[adapter.name] = adapter
            _run(model, state, [adapter.name], state.enabled, touched)
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
    check_trained(model, [state.adapters[name] for name in names if enabled and name in state.adapters])
    changed = [state.adapters[n] for n in dict.fromkeys((*state.active, *names)) if n in state.adapters]
    touched = hosts(model, changed)
    with restoring(model, [*changed, *_named(state)], touched.values()):
        _run(model, state, names, enabled, touched)


def _run(model: nn.Module, state: ModelState, names: list[str], enabled: bool, touched: dict[str, nn.Module]) -> None:
    """:func:`switch` of the modules that it touches, inside of a change that is undone where it breaks off."""
    old, old_enabled, named = state.active, state.enabled, _named(state)
    state.active, state.enabled = names, enabled
    rebind(model, touched, state.running())
    if enabled == old_enabled:  # adapters were chosen, not switched off or on
        for adapter in named:
            state.note(adapter)
            adapter.trained = None
    set_trainable(state, (*old, *names, *(adapter.name for adapter in named)))
    watch_loss(model, state)


def _named(state: ModelState) -> list[Adapter]:
    """The adapters that were said to be trained or not, by name."""
    return [adapter for adapter in state.adapters.values() if adapter.trained is not None]
