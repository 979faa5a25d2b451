"""The scale that a pipeline gives its text encoders: diffusers' two functions, which know PEFT's layers alone."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from diffusers.utils import USE_PEFT_BACKEND, peft_utils
from torch import nn

from fxpeft.adapters.api import set_scale
from fxpeft.adapters.calls import check_factor
from fxpeft.adapters.state import ModelState, Strength, find_state

_BACKEND = "USE_PEFT_BACKEND"
BEFORE = "_fxpeft_scaled"  # on a model while a pipeline has it scaled: adapter -> strength


def watch_scales() -> None:
    """Let the scales that pipelines give their text encoders reach fxpeft's adapters, from now on."""
    for ours in (scale_lora_layers, unscale_lora_layers):
        _replace(ours.__name__, getattr(peft_utils, ours.__name__), ours)
    if not USE_PEFT_BACKEND:  # pipelines call the two where PEFT is installed, and else one that knows other layers
        _replace(_BACKEND, False, True)


def unwatch_scales() -> None:
    """The inverse of :func:`watch_scales`, also in modules that were imported since."""
    for ours in (scale_lora_layers, unscale_lora_layers):
        _replace(ours.__name__, ours, getattr(peft_utils, ours.__name__))
    if not USE_PEFT_BACKEND:
        _replace(_BACKEND, True, False)


def _replace(name: str, before: Any, after: Any) -> None:
    """Each module that imported it has a name of its own. Where it is defined it stays: compiled forwards call it."""
    for key, module in tuple(sys.modules.items()):
        ours = key.partition(".")[0] == "diffusers" and isinstance(module, ModuleType) and module is not peft_utils
        if name == _BACKEND:
            ours = ours and key.startswith(("diffusers.pipelines.", "diffusers.modular_pipelines."))
        if ours and vars(module).get(name) is before:
            setattr(module, name, after)


def scale_lora_layers(model: nn.Module, weight: float) -> None:
    """Multiply the scales of the active adapters until :func:`unscale_lora_layers`."""
    state = find_state(model)
    if state is None:
        if USE_PEFT_BACKEND:
            theirs: Any = peft_utils
            theirs.scale_lora_layers(model, weight)
        return
    _put_back(model, state)  # a call that broke off has left it
    if weight == 1:
        return
    before: dict[str, Strength] = {}
    vars(model)[BEFORE] = before
    for adapter in [state.get(name) for name in state.active if name not in state.in_weights()]:
        check_factor(adapter, weight)
        before[adapter.name] = adapter.strength
        set_scale(model, adapter.name, adapter.stronger(weight))


def unscale_lora_layers(model: nn.Module, weight: float | None = None) -> None:
    """Give the adapters the scales that they had."""
    state = find_state(model)
    if state is None:
        if USE_PEFT_BACKEND:
            peft_utils.unscale_lora_layers(model, weight)
    else:
        _put_back(model, state)


def _put_back(model: nn.Module, state: ModelState) -> None:
    for name, strength in vars(model).pop(BEFORE, {}).items():
        if name in state.adapters and name not in state.in_weights():
            set_scale(model, name, strength)
