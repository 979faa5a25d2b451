"""A function of torch's that somebody replaced, as DeepSpeed's ZeRO-3 does ``F.linear``: in a graph it is that still.

A replacement is Python, which a trace would go through: into an autograd function, where a proxy is no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.fx import Proxy

from fxpeft.passes.torch_private import LINEAR

_lock = threading.RLock()


def linear(*args: Any, **kwargs: Any) -> Any:
    """``F.linear``, whichever function that is when it runs: the node of a replaced one."""
    return F.linear(*args, **kwargs)


@contextmanager
def one_node_each() -> Iterator[None]:
    """Let a function that was replaced be one node while a graph is traced. For all else it goes on as it was replaced:
    other threads compute meanwhile."""
    if F.linear is LINEAR:
        yield
        return
    with _lock:
        given = F.linear
        F.linear = ours = _noted(given)
        try:
            yield
        finally:
            if F.linear is ours:
                F.linear = given


def _noted(given: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
        if proxy is None:
            return given(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", linear, args, kwargs)

    return call
