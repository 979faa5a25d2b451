"""Locked classes: a module's calls hold a lock; what is traced of it is its own forward alone.

A locked class is a subclass of the module's class, with its name, whose ``forward`` takes the lock that stands on
the module and then runs the class's own. Dynamo skips that frame and goes on to the next: eager or compiled, the
lock is held around it by ``try`` and ``finally``. Where a forward is inlined into a larger graph it is gone.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from _thread import get_ident
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from fxpeft.passes.base import PassError
from fxpeft.passes.live.asked import scale_argument, take_scale
from fxpeft.passes.torch_private import checkpoint_above, constants_setting, in_backward, skip_frame

LOCK = "_fxpeft_lock"  # where a module's lock stands
UNLOCKED = "_fxpeft_unlocked"  # on a locked class: the class that it locks


class Lock(Protocol):
    """What a locked class needs."""

    readers: dict[object, int]
    gates: dict[Any, None]
    version: int
    hold_generate: bool
    classes: dict[type, type]
    before_read: Callable[[], None] | None
    lanes: bool
    factor: float

    def reads(self, thread: int) -> bool: ...
    def acquire_read(self, key: object, factor: float = 1.0, module: nn.Module | None = None) -> None: ...
    def wake(self) -> None: ...
    def read(self) -> Any: ...
    def torn_backward(self) -> Exception: ...
    def other_factor(self, factor: float) -> Exception: ...
    def naming(self, module: nn.Module, names: Any, generate: Any = None) -> AbstractContextManager[None]: ...
    def snapshot(self, module: nn.Module) -> nn.Module | None: ...


def move(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, locked where the module has a lock."""
    lock = vars(module).get(LOCK)
    if lock is not None:
        if cls not in lock.classes:
            lock.classes[cls] = locked_class(cls)  # kept: for Dynamo another class is another model
        cls = lock.classes[cls]
    module.__class__ = cls


def unlocked(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a locked class locks; any other itself."""
    return vars(cls).get(UNLOCKED, cls)  # type: ignore[no-any-return]


def locked_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The locked subclass of a class; the same one for all models that are there."""
    found = next((s for s in type.__subclasses__(cls) if UNLOCKED in vars(s)), None)
    if found is not None:
        return found
    forward: Any = cls.forward
    if str(forward.__module__).partition(".")[0] == "torch":
        forward = _framed(forward)
    members: dict[str, Any] = {
        "__module__": cls.__module__,  # whole models are looked up by class name, and so are parts to be recorded
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        UNLOCKED: cls,
    }
    made: type[nn.Module] = type(cls.__name__, (cls,), members)
    made.forward = _locked(forward, made)
    if callable(getattr(cls, "generate", None)):
        made.generate = _held(cls.generate)  # type: ignore[attr-defined]
    return made


def _framed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of torch's own in a frame that isn't: Dynamo doesn't begin with torch's."""

    @functools.wraps(forward)
    def framed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return framed


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def refuse_constants() -> None:
    """Dynamo calls this when it traces a part of a prepared model.

    Raises:
        PassError: it would take what the slots hold now for constants.
    """
    if torch.compiler.is_exporting():  # a program's constants are the slots' tensors
        return
    if (setting := constants_setting()) is not None:
        raise PassError(f"{setting}: expected False, for it makes constants of slots, and swaps would have no effect")


def _locked(inner: Callable[..., Any], made: type[nn.Module]) -> Callable[..., Any]:
    own_names = "adapter_names" in inspect.signature(inner).parameters
    scales = scale_argument(inner)

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            refuse_constants()
            return inner(self, *args, **kwargs)
        lock, me = vars(self).get(LOCK), get_ident()
        if kwargs.get("adapter_names") is not None and lock is not None and lock.lanes and not own_names:
            with lock.naming(self, kwargs.pop("adapter_names")):
                return forward(self, *args, **kwargs)
        factor = None if scales is None or lock is None else take_scale(scales, kwargs)
        if lock is None or me in lock.readers or lock.reads(me):
            if lock is not None and factor is not None and factor != lock.factor:
                raise lock.other_factor(factor)
            if not isinstance(self, made):
                return type(self).forward(self, *args, **kwargs)
            if lock is not None and lock.before_read is not None and me not in lock.readers:
                lock.before_read()  # inside of a hold, which may have begun on another stream
            if lock is not None and (not torch.is_grad_enabled() or in_backward()):
                _watch(lock)
            return inner(self, *args, **kwargs)
        readers = lock.readers
        try:
            lock.acquire_read(me, 1.0 if factor is None else factor, self)
            if not isinstance(self, made):  # it was bound anew after this method was looked up
                return type(self).forward(self, *args, **kwargs)
            if not torch.is_grad_enabled() or in_backward():
                _watch(lock)
            return inner(self, *args, **kwargs)
        finally:
            readers.pop(me, None)  # a call of C first: no interrupt comes between
            if lock.gates:
                lock.wake()

    skip_frame(forward)
    return forward


def _held(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        lock = vars(self).get(LOCK)
        if lock is not None and lock.lanes and not torch.compiler.is_dynamo_compiling():
            with lock.naming(self, kwargs.pop("adapter_names", None), (args, kwargs)):
                return held(self, *args, **kwargs)
        return held(self, *args, **kwargs)

    def held(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        lock, me = vars(self).get(LOCK), get_ident()
        if torch.compiler.is_dynamo_compiling() or lock is None or not lock.hold_generate or lock.reads(me):
            return inner(self, *args, **kwargs)
        readers = lock.readers
        try:
            lock.acquire_read(me)
            return inner(self, *args, **kwargs)
        finally:
            readers.pop(me, None)
            if lock.gates:
                lock.wake()

    skip_frame(generate)
    skip_frame(held)
    return generate


_frame = _locked(nn.Identity.forward, nn.Identity).__code__


def _watch(lock: Lock) -> None:
    """A reentrant checkpoint notes the slots' version in its forward; its backward has to see the same.

    It computes its forward again in its backward, and nothing of torch's notices that slots were written between.
    """
    if torch.is_inference_mode_enabled():
        return
    found = checkpoint_above(_frame)
    if found is None:
        return
    context, backward = found
    noted: dict[int, int] = vars(context).setdefault(LOCK, {})
    if not backward:
        noted[id(lock)] = lock.version
    elif noted.get(id(lock), lock.version) != lock.version:
        raise lock.torn_backward()


for _function in (_watch, in_backward):
    skip_frame(_function, deep=True)


def _state(module: nn.Module) -> Any:
    return module.__getstate__() if hasattr(module, "__getstate__") else vars(module)  # type: ignore[no-untyped-call]


def _plain(module: nn.Module, protocol: int) -> tuple[Any, ...] | None:
    """How to make the module again and its state; ``None`` where its class has ways of its own."""
    cls = unlocked(type(module))
    if "_fxpeft_source" in vars(cls):
        return cls.__reduce_ex__(module, protocol)  # type: ignore[return-value]
    if cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
        return copyreg.__newobj__, (cls,), _state(module)  # type: ignore[attr-defined]
    return None


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickle what one moment has: the pickler comes back for the tensors when swaps are no longer kept out."""
    lock = vars(self).get(LOCK)
    twin = None if lock is None else lock.snapshot(self)
    if twin is not None:
        self = twin
    how = _plain(self, protocol)
    if how is None:
        return unlocked(type(self)).__reduce_ex__(self, protocol)
    return relock, how[:2], how[2]


def relock(function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Make a pickled module, locked; its lock comes with its state."""
    made = function(*args)
    made.__class__ = locked_class(type(made))
    return made


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    lock = vars(self).get(LOCK)
    if lock is None or lock.reads(get_ident()):
        return _copied(self, memo)
    with lock.read():
        return _copied(self, memo)


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own = getattr(unlocked(type(module)), "__deepcopy__", None)
    if own is not None:
        return own(module, memo)  # type: ignore[no-any-return]
    how = _plain(module, 4)
    if how is None:
        raise TypeError(f"{type(module).__name__} has a __reduce__ of its own and no __deepcopy__: it can't be copied")
    made = relock(*how[:2])
    memo[id(module)] = made
    made.__setstate__(copy.deepcopy(how[2], memo))  # type: ignore[no-untyped-call]
    return made
