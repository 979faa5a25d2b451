"""What a call may ask of slots with lanes alone: adapters per row, which a forward's ``**kwargs`` would swallow."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.passes.live import base_class, given_forward
from fxpeft.passes.live.locked import LOCK
from fxpeft.passes.torch_private import skip_frame


def check_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Forward pre-hook of the root.

    Raises:
        AdapterError: the call names adapters for its rows, and the model's own forward has no such parameter.
    """
    if kwargs.get("adapter_names") is None:
        return
    lock = vars(module).get(LOCK)
    if lock is not None and lock.lanes and not torch.compiler.is_compiling():
        return  # the locked forward, which comes next, takes it
    if "adapter_names" not in inspect.signature(given_forward(module) or base_class(module).forward).parameters:
        raise AdapterError(
            f"adapter_names={kwargs['adapter_names']!r}: expected no such argument; every row of a batch gets the "
            "active adapters, so naming some for each row would be ignored. Call the model once for each adapter, "
            "with set_adapter(model, name) before, or prepare it for rows of their own: prepare_hotswap(model, lanes=8)"
        )


skip_frame(check_call, deep=True)  # Dynamo would compile it, once for each class of models


def watch_calls(model: nn.Module) -> None:
    """Check every call of the model from now on."""
    model.register_forward_pre_hook(check_call, with_kwargs=True)


def unwatch_calls(model: nn.Module) -> None:
    """The inverse of :func:`watch_calls`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is check_call]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
