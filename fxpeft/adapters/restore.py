"""Put back what a change that breaks off has done: modules and records as they were, whatever the error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxpeft.adapters.state import Adapter, find_state
from fxpeft.model.wrappers import faces, unwrap
from fxpeft.passes.container import Container


class _Was:
    """The attributes of a module or a record, and what the dicts, sets and lists among them hold; no values."""

    def __init__(self, thing: object) -> None:
        self.thing, self.cls, self.own = thing, type(thing), dict(vars(thing))
        every = not isinstance(thing, nn.Module)
        self.held: list[tuple[Any, Any]] = [
            (value, value.copy() if value else ()) for name, value in self.own.items()  # most of a module's are empty
            if (every or name[0] == "_") and isinstance(value, (dict, set, list))
        ]  # fmt: skip

    def put_back(self) -> None:
        """Give everything back in place, since others may hold these very dicts; what is the same isn't touched."""
        if type(self.thing) is not self.cls:
            self.thing.__class__ = self.cls
        for now, before in ((vars(self.thing), self.own), *self.held):
            if not _same(now, before):
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)


def _same(now: Any, before: Any) -> bool:
    pairs = zip(*((c.items() if isinstance(c, dict) else ((x, x) for x in c)) for c in (now, before)), strict=False)
    return len(now) == len(before) and all(k == key and v is value for (k, v), (key, value) in pairs)


@contextmanager
def restoring(
    model: nn.Module,
    adapters: Iterable[Adapter],
    modules: Collection[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] = (),
) -> Iterator[None]:
    """Change what a model is made of, all or nothing: after an error, whichever and wherever, it is what it was.

    Modules have their classes, children, parameters (the same objects, which an optimiser may hold) and hooks back,
    the records and the adapters theirs, and parameters are trained that were. Values that were written stay written.

    Args:
        adapters: those that the change may touch.
        modules: the modules that it may touch; what fxpeft put below them is known. Default: all of the model.
        parameters: those of the base that it may freeze, where the modules are given.
    """
    state, adapters = find_state(model), list(adapters)
    if modules is None:
        parts = [*model.modules()]
    else:  # other adapters' parts, which lie there too, are not looked at
        parts = [p for m in modules for p in (m, *(c for c in m._modules.values() if isinstance(c, Container)))]
        parts += [part for adapter in adapters for held in adapter.parts.values() for part in held.modules()]
    was = [_Was(thing) for thing in (*dict.fromkeys((*faces(unwrap(model)), *parts)), *adapters)]
    trained = [*parameters, *(p for adapter in adapters for p in adapter.parameters())]
    if modules is None:
        trained += model.parameters()
    grads = [(parameter, parameter.requires_grad) for parameter in trained]
    lock, repair = None, None
    if state is not None:
        was.append(_Was(state))
        lock = None if state.serving is None else state.serving.lock
        repair = None if lock is None else lock.repair
    try:
        yield
    except BaseException:
        for each in was:
            each.put_back()
        for parameter, trains in grads:
            if parameter.requires_grad is not trains:
                parameter.requires_grad_(trains)
        if lock is not None:
            lock.repair = repair
        raise


@contextmanager
def writing(tensors: Collection[torch.Tensor]) -> Iterator[None]:
    """Write into tensors, all or nothing: after an error their values are what they were."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        raise
