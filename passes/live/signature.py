"""What a module's own graph depends on, as a key: modules of equal keys share what was traced of one."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.passes.container import Container
from fxpeft.passes.live.instance import DIFFUSERS, base_class, given_forward
from fxpeft.passes.live.locked import LOCK
from fxpeft.passes.rewrite.feed import LEAF
from fxpeft.passes.targets.operations.registry import OPERATIONS
from fxpeft.passes.torch_private import LINEAR

_NOT_TRACED = frozenset(
    {
        "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_old_forward", "_hf_hook",
        DIFFUSERS, LEAF, LOCK,
    }
)  # fmt: skip
_PLAIN = (int, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_IDENTITY = (FunctionType, property, staticmethod, classmethod, type)


class Unknown(Exception):
    """A value that a trace may read, and that no key can hold."""


def signature(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module's own graph depends on; ``None`` where that can't be told from plain attributes.

    Plain attributes and those of the class are in it by type and value, since a trace writes them into
    the graph; tensors by type, shape and dtype: a trace only names them.
    """
    try:
        # another list of operations reads other targets; a function that was replaced is another node
        return tuple(map(id, OPERATIONS)), F.linear is LINEAR, *_signature(module)
    except Unknown:
        return None


def _signature(module: nn.Module) -> tuple[Any, ...]:
    if given_forward(module) is not None:
        raise Unknown
    plain = [(name, frozen(value)) for name, value in traced_attributes(module)]
    tensors = [
        (name, None if tensor is None else (type(tensor), tensor.shape, tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]
    children = []
    for name, child in module._modules.items():
        if isinstance(child, Container):
            continue
        if child is not None and any(vars(child).get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            raise Unknown
        children.append((name, None if child is None else _signature(child)))
    cls = base_class(module)
    return cls, tuple(plain), tuple(tensors), tuple(children), tuple(_of_class(cls))


def traced_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module itself, beside tensors and children, that its forward may read."""
    for name, value in vars(module).items():
        if name not in _NOT_TRACED and not name.endswith("_hooks") and "_hooks_" not in name:
            yield name, value


def frozen(value: Any) -> Any:
    """A value as a part of a key; ``1``, ``True`` and ``1.0`` are three.

    Raises:
        Unknown: it is no plain value.
    """
    if isinstance(value, float | complex):
        return type(value), repr(value)  # -0.0 is not 0.0, and NaN is NaN
    if type(value) in _PLAIN:
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(frozen, value))
    raise Unknown


def _of_class(cls: type) -> Iterator[tuple[Any, ...]]:
    """What a forward may read of its class: plain values, and functions with what they read outside of it."""
    for owner in cls.__mro__:
        if owner is nn.Module:
            return
        for name, value in vars(owner).items():
            if name.startswith("__") and name.endswith("__"):
                continue
            if isinstance(value, _BY_IDENTITY):
                yield (name, value, *(_read_by(value) if isinstance(value, FunctionType) else ()))
            elif not isinstance(value, Tensor):
                yield name, frozen(value)
            else:
                raise Unknown


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The plain values that a function reads from around it: globals and closed-over names."""
    code, outside = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    values = [(name, outside[name]) for name in code.co_names if name in outside]
    for name, cell in cells:
        try:
            values.append((name, cell.cell_contents))
        except ValueError:  # still empty
            continue
    for name, value in values:
        try:
            yield name, frozen(value)
        except Unknown:
            continue
