"""Functions of tensors that torch.fx doesn't look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Proxy


def one_node(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Called on a proxy the function is one node of its graph; on tensors, fake ones too, it is its code."""

    @functools.wraps(function)
    def call(x: Tensor, *args: Any) -> Tensor:
        if isinstance(x, Proxy):
            made: Any = x.tracer.create_proxy("call_function", call, (x, *args), {})
            return made
        return function(x, *args)

    return call
