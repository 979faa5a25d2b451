"""The base of a prepared model gets other weights: slots follow, and what was computed from the weights before."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxpeft.adapters.change import changing
from fxpeft.adapters.state import find_state
from fxpeft.model.placement import placement
from fxpeft.model.wrappers import submodule
from fxpeft.serving.lowering import lower_again
from fxpeft.serving.swap import Serving, reshow, serving_of


def watch_loads(model: nn.Module) -> None:
    """Follow every ``load_state_dict`` of the model."""
    model.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]


def unwatch_loads(model: nn.Module) -> None:
    """The inverse of :func:`watch_loads`."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _loaded]:
        del hooks[key]


def _loaded(model: nn.Module, incompatible: Any) -> None:
    with changing(model):
        state = find_state(model)
        if state is None or state.serving is None:
            return
        serving = serving_of(state)
        if _give_memory(model, serving):
            lower_again(state)
        serving.torn = True  # whatever the slots hold, they are written whole
        reshow(model, serving, [state.adapters[adapter.name] for adapter in serving.shown])


def _give_memory(model: nn.Module, serving: Serving) -> bool:
    """Take what stands in the place of the base's tensors off the meta device where these are no longer there.

    Returns:
        whether none of them is there any more.
    """
    whole = True
    for name in serving.locked():
        module = submodule(model, name)
        device, _ = placement(module, model, autocast=False)
        if device.type == "meta":
            whole = False
            continue
        slot = module._modules.get("slot")
        for part in () if slot is None else slot.modules():
            if any(buffer is not None and buffer.is_meta for buffer in part._buffers.values()):
                part.to_empty(device=device, recurse=False)
    return whole
