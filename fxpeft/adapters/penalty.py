"""A method's term in the model's loss, added by a hook of the model while such an adapter trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxpeft.adapters.state import ModelState, state_of
from fxpeft.methods import method_of
from fxpeft.methods.base import Method, SiteAdapter


def watch_loss(model: nn.Module, state: ModelState) -> None:
    """Have the hook exactly while a running adapter that trains has a term."""
    wanted = any(type(method_of(a.config)).penalty is not Method.penalty and a.trains for a in state.running())
    if wanted and _add not in model._forward_hooks.values():
        model.register_forward_hook(_add)
    elif not wanted:
        unwatch_loss(model)


def unwatch_loss(model: nn.Module) -> None:
    """Take the hook out."""
    for key in [key for key, hook in model._forward_hooks.items() if hook is _add]:
        del model._forward_hooks[key]


def _add(model: nn.Module, args: Any, output: Any) -> Any:
    if getattr(output, "loss", None) is None:
        return output
    for adapter in state_of(model).running():
        if adapter.trains:
            sites = [part for part in adapter.parts.values() if isinstance(part, SiteAdapter)]
            term = method_of(adapter.config).penalty(adapter.config, sites)
            if term is not None:
                output.loss = output.loss + term
    return output
