"""What a call may ask: adapters per row, which a forward's ``**kwargs`` would swallow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.passes.live import base_class, given_forward
from fxpeft.passes.live.locked import LOCK
from fxpeft.passes.torch_private import skip_frame

_OPEN = "_fxpeft_rows_of_call"  # where a model has the block of a call's rows


class RowsOfCalls:
    """What gives the rows of a call of a model without slots the adapters that it names."""

    #: :mod:`fxpeft.serving.rows` has it
    naming: ClassVar[Callable[..., AbstractContextManager[None]]]


def check_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the root: a model without slots takes its rows apart until the call ends.

    Raises:
        AdapterError: the call names adapters for its rows, and slots have no lanes, or rows can't have them.
    """
    if kwargs.get("adapter_names") is None:
        return None
    lock = vars(module).get(LOCK)
    if lock is not None and lock.lanes and not torch.compiler.is_compiling():
        return None  # the locked forward, which comes next, takes it
    if "adapter_names" in inspect.signature(given_forward(module) or base_class(module).forward).parameters:
        return None
    if lock is not None or torch.compiler.is_compiling():
        raise AdapterError(
            f"adapter_names={kwargs['adapter_names']!r}: expected no such argument; every row of a batch gets the "
            "active adapters, so naming some for each row would be ignored. Prepare the model for rows of their own, "
            "prepare_hotswap(model, lanes=8), or call it once for each adapter, with set_adapter(model, name) before"
        )
    block = RowsOfCalls.naming(module, kwargs["adapter_names"])
    block.__enter__()
    vars(module)[_OPEN] = block
    if end_call not in module._forward_hooks.values():
        module.register_forward_hook(end_call, always_call=True)
    return args, {name: value for name, value in kwargs.items() if name != "adapter_names"}


def end_call(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root, called after errors too: the rows of the call are named no longer."""
    block = vars(module).pop(_OPEN, None)
    if block is not None:
        block.__exit__(None, None, None)


skip_frame(check_call, deep=True)  # Dynamo would compile it, once for each class of models


def watch_calls(model: nn.Module) -> None:
    """Check every call of the model from now on."""
    model.register_forward_pre_hook(check_call, with_kwargs=True)


def unwatch_calls(model: nn.Module) -> None:
    """The inverse of :func:`watch_calls`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is check_call]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in model._forward_hooks.items() if hook is end_call]:
        del model._forward_hooks[key]
        model._forward_hooks_always_called.pop(key, None)
