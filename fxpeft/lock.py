"""Forward passes and swaps exclude each other: a forward sees one adapter, whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxpeft.passes.live import base_class, bind_source, is_bound, unbind


class SwapLock:
    """Many readers (forwards) or one writer (a swap). A waiting swap goes before later forwards.

    Readers may nest in one thread. A copy of a model gets a lock of its own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False
        self._local = threading.local()

    def acquire_read(self) -> None:
        """Begin a forward; waits for a swap that is under way or waiting."""
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            with self._changed:
                while self._writing or self._writers_waiting:
                    self._changed.wait()
                self._readers += 1
        self._local.depth = depth + 1

    def release_read(self) -> None:
        """End a forward."""
        self._local.depth -= 1
        if self._local.depth == 0:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def read(self) -> Iterator[None]:
        """A forward, or several that have to see the same adapter."""
        self.acquire_read()
        try:
            yield
        finally:
            self.release_read()

    @contextmanager
    def write(self) -> Iterator[None]:
        """A swap; waits for the forwards that are under way. A swap may be part of a larger one of its thread."""
        if getattr(self._local, "writing", False):
            yield
            return
        if getattr(self._local, "depth", 0):
            raise RuntimeError("a swap inside a forward of the same thread would wait for itself: swap after it")
        with self._changed:
            self._writers_waiting += 1
            while self._writing or self._readers:
                self._changed.wait()
            self._writers_waiting -= 1
            self._writing = True
        self._local.writing = True
        try:
            yield
        finally:
            self._local.writing = False
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return SwapLock, ()


# Hooks on the root module. Dynamo runs a compiled root's hooks outside of the graph; where the model
# is inlined into a larger compiled function there is no outside, and the hooks trace to nothing. A root
# of one of torch's own classes it would inline too (torch 2.13): such a one is given a forward that isn't torch's.

_FORWARD = "def forward(self, *args, **kwargs):\n    return type(self)._fxpeft_base.forward(self, *args, **kwargs)\n"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def enter_forward(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: hold the model's swap lock."""
    vars(module)["_fxpeft"].serving.lock.acquire_read()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def leave_forward(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, called on errors too."""
    vars(module)["_fxpeft"].serving.lock.release_read()


def _nothing(*args: Any) -> None:
    return None


for _hook in (enter_forward, leave_forward):
    torch.compiler.substitute_in_graph(_hook, skip_signature_check=True)(_nothing)


def guard_forwards(model: nn.Module) -> None:
    """Let every call of the model take its swap lock."""
    if not is_bound(model) and _is_torchs(model):
        bind_source(model, _FORWARD)
    model.register_forward_pre_hook(enter_forward)
    model.register_forward_hook(leave_forward, always_call=True)


def unguard_forwards(model: nn.Module) -> None:
    """The inverse of :func:`guard_forwards`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (enter_forward, leave_forward)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if _is_torchs(model):
        unbind(model)


def _is_torchs(model: nn.Module) -> bool:
    return base_class(model).forward.__module__.partition(".")[0] == "torch"
