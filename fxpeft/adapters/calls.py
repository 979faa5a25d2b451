"""What a call may ask of its adapters: one for each row, which a forward's ``**kwargs`` would swallow, and a scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from fxpeft.adapters.invocation import call_of
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.parts import SiteAdapter
from fxpeft.passes.live import base_class, given_forward, scale_argument, take_scale
from fxpeft.passes.live.locked import LOCK
from fxpeft.passes.torch_private import skip_frame

STATE = "_fxpeft"  # where a model has its state
_OPEN = "_fxpeft_rows_of_call"  # where a model has the block of a call's rows


class RowsOfCalls:
    """What gives the rows of a call of a model without slots the adapters that it names."""

    #: :mod:`fxpeft.serving.rows` has it
    naming: ClassVar[Callable[..., AbstractContextManager[None]]]


def check_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the root. A model without slots takes its rows apart, and has the scale, until the call ends.

    Raises:
        AdapterError: the call names adapters for its rows, and slots have no lanes, or rows can't have them; or it asks
            for a scale that an adapter can't have.
    """
    _end_rows(module)  # of a call that Ctrl-C broke off, after which torch calls no hook
    given_kwargs, kwargs = kwargs, _without_rows(module, kwargs)
    lock, name = vars(module).get(LOCK), scale_argument(base_class(module).forward)
    if name is not None and torch.compiler.is_compiling():
        given = kwargs.get(name)
        if given is not None and "scale" in given:
            raise AdapterError(
                f"{name}={{'scale': ...}}: this call is traced as part of a larger compiled function, where the number "
                "would be a constant; compile the model itself, or use fxpeft.set_scale before the call"
            )
    elif name is not None and lock is None:  # a locked forward takes it itself
        kwargs = dict(kwargs)
        scale = take_scale(name, kwargs)
        set_factor(module, 1.0 if scale is None else scale)
    state = vars(module).get(STATE)
    if state is not None and state.reaches():
        state.enter(call_of(args, kwargs))
        _end_by_hook(module)
    return None if kwargs is given_kwargs else (tuple(args), kwargs)


def _without_rows(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("adapter_names") is None:
        return kwargs
    lock = vars(module).get(LOCK)
    if lock is not None and lock.lanes and not torch.compiler.is_compiling():
        return kwargs  # the locked forward, which comes next, takes it
    if "adapter_names" in inspect.signature(given_forward(module) or base_class(module).forward).parameters:
        return kwargs
    if lock is not None or torch.compiler.is_compiling():
        raise AdapterError(
            f"adapter_names={kwargs['adapter_names']!r}: expected no such argument; every row of a batch gets the "
            "active adapters, so naming some for each row would be ignored. Prepare the model for rows of their own, "
            "prepare_hotswap(model, lanes=8), or call it once for each adapter, with set_adapter(model, name) before"
        )
    block = RowsOfCalls.naming(module, kwargs["adapter_names"])
    block.__enter__()
    vars(module)[_OPEN] = block
    _end_by_hook(module)
    return {name: value for name, value in kwargs.items() if name != "adapter_names"}


def _end_by_hook(module: nn.Module) -> None:
    if end_call not in module._forward_hooks.values():
        module.register_forward_hook(end_call, always_call=True)


def _end_rows(module: nn.Module) -> None:
    block = vars(module).pop(_OPEN, None)
    if block is not None:
        block.__exit__(None, None, None)


def set_factor(module: nn.Module, factor: float) -> None:
    """Have a factor on the scales of the active adapters of a model that isn't prepared, beside their strengths."""
    state = vars(module).get(STATE)
    for adapter in () if state is None or state.serving is not None else state.running():
        for site, part in adapter.parts.items():
            if isinstance(part, SiteAdapter) and part.factor != factor:
                check_factor(adapter, factor)
                part.set_strength(adapter.strength_at(site), factor)


def check_factor(adapter: Any, factor: float) -> None:
    """Refuse a factor where a method has no scale.

    Raises:
        AdapterError: it has none.
    """
    if not math.isfinite(factor):
        raise AdapterError(f"a call asks for the scale {factor}: expected a finite number")
    if factor != 1 and not method_of(adapter.config).scales(adapter.config):
        raise AdapterError(
            f"a call asks for the scale {factor:g}, and adapter {adapter.name!r}, {method_of(adapter.config).name}, "
            "has none to change"
        )


def end_call(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root, called after errors too: the rows of the call are named no longer, and what is called
    by itself next has its own scale. A backward needs that of its forward: then it stays until the next call.
    """
    state = vars(module).get(STATE)
    if state is not None and state.reaches():
        state.leave(output)
    _end_rows(module)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        set_factor(module, 1.0)


for _function in (check_call, end_call):
    skip_frame(_function, deep=True)  # Dynamo would compile it, once for each class of models


def watch_calls(model: nn.Module) -> None:
    """Check every call of the model from now on."""
    model.register_forward_pre_hook(check_call, with_kwargs=True)
    if scale_argument(base_class(model).forward) is not None:
        model.register_forward_hook(end_call, always_call=True)


def unwatch_calls(model: nn.Module) -> None:
    """The inverse of :func:`watch_calls`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is check_call]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in model._forward_hooks.items() if hook is end_call]:
        del model._forward_hooks[key]
        model._forward_hooks_always_called.pop(key, None)
