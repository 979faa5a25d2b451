"""Functions of tensors that torch.fx doesn't look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

T = TypeVar("T")


def one_node(function: Callable[..., T]) -> Callable[..., T]:
    """Called on a proxy the function is one node of its graph; on tensors, fake ones too, it is its code."""

    @functools.wraps(function)
    def call(x: Any, *args: Any) -> T:
        if isinstance(x, Proxy):
            made: Any = x.tracer.create_proxy("call_function", call, (x, *args), {})
            return made  # type: ignore[no-any-return]
        return function(x, *args)

    return call
