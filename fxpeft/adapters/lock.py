"""Forward passes and swaps exclude each other: a forward sees one adapter, whole."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from _thread import LockType, allocate_lock, get_ident
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from torch import nn

from fxpeft.errors import LockError, LockTimeout
from fxpeft.passes.torch_private import count_waiting_call, skip_frame

TIMEOUT = 60.0  # seconds that a wait takes at most where nothing else was said
_SLICE = 0.1  # a wait looks again after so many seconds, should nobody have woken it


class SwapLock:
    """Many readers (forwards) or one writer (a swap), which are threads. A copy of a model gets a lock of its own.

    A waiting swap goes before later forwards, and forwards that waited for one swap go before the next, so that
    with any number of both each has its turn. What is inside a forward or a swap of the same thread is part of it.

    Ctrl-C may come between any two steps of Python. So what is held is an entry in a dict, which one call of C
    makes or takes away, and taking it away twice does no harm; and nobody relies on being woken.

    Args:
        timeout: seconds after which a wait ends in :class:`~fxpeft.errors.LockTimeout`.
        hold_generate: whether a whole ``generate`` is one read.

    ``version`` counts the swaps. While ``repair`` is set the slots may be torn: nobody reads them before it ran.
    ``before_read`` is called by every forward, inside: it orders what devices do. ``None``: there is nothing to order.
    With ``lanes`` a call may name adapters for its rows. ``factor`` is on the scales in the slots, as the last call
    asked for it, and ``rescale`` writes another: a function of the module that is called and the factor.
    """

    def __init__(self, timeout: float = TIMEOUT, hold_generate: bool = True, lanes: bool = False) -> None:
        if not timeout > 0:
            raise LockError(f"lock_timeout: expected a number of seconds above 0, found {timeout!r}")
        self.timeout, self.hold_generate, self.lanes = float(timeout), hold_generate, lanes
        self.version = 0
        self.repair: Callable[[], None] | None = None
        self.before_read: Callable[[], None] | None = None
        self.factor = 1.0
        self.rescale: Callable[[nn.Module | None, float], None] | None = None
        self.readers: dict[object, int] = {}  # thread, or what stands for a hold -> thread
        self.claim: dict[str, int] = {}  # "writer": the thread that swaps, or waits to; "writing": it is alone now
        self.waiting: dict[object, int] = {}  # readers that wait for a swap
        self.turn: dict[object, int] = {}  # those of them that go before the next swap
        self.gates: dict[LockType, None] = {}  # one for each wait
        self.classes: dict[type, type] = {}  # a class of the model's modules -> what it is while they are locked
        self.sealed = False  # nobody else has what it guards
        _locks.add(self)

    def reads(self, thread: int) -> bool:
        """Whether a thread is inside a forward or a hold."""
        return thread in self.readers or thread in tuple(self.readers.values())

    def acquire_read(self, key: object, factor: float = 1.0, module: nn.Module | None = None) -> None:
        """Begin to read; waits for a swap that is under way or waiting. On an error, release too.

        Args:
            factor: on the scales in the slots. Where that is another, it is written first, alone.
            module: what is called.
        """
        me = get_ident()
        if self.reads(me) or self.claim.get("writer") == me:
            self.readers[key] = me
            return
        deadline = time.monotonic() + self.timeout
        try:
            self.waiting[key] = me
            self.readers[key] = me  # stand in the list, then look; a writer claims, then looks: one sees the other
            while self.claim:
                self.release_read(key)
                count_waiting_call()
                self._wait(lambda: not self.claim, deadline, "a forward waits for a swap")
                self.readers[key] = me
        finally:
            self.waiting.pop(key, None)
            self.turn.pop(key, None)
        if self.repair is not None:
            self.release_read(key)
            with self.write():
                pass  # it repairs, or says why it can't
            self.acquire_read(key, factor, module)
            return
        if self.factor != factor:
            self.release_read(key)
            with self.write():
                if self.factor != factor and self.rescale is not None:
                    self.rescale(module, factor)
                self.readers[key] = me  # before the write ends: nobody comes between
        if self.gates:
            self.wake()
        if self.before_read is not None:
            self.before_read()

    def release_read(self, key: object) -> None:
        """End what began under that key."""
        self.readers.pop(key, None)
        if self.gates:
            self.wake()

    def acquire_write(self) -> bool:
        """Begin a swap; waits for the forwards that are under way. ``False``: it is part of a larger one."""
        me = get_ident()
        if self.claim.get("writer") == me:
            return False
        if self.reads(me):
            raise LockError(_inside())
        deadline = time.monotonic() + self.timeout
        try:
            while self._due() or self.claim.setdefault("writer", me) != me:
                self._wait(lambda: not self._due() and not self.claim, deadline, "a swap waits for its turn")
            while True:
                self.claim["writing"] = me
                if not self._others(me):
                    break
                self.claim.pop("writing", None)
                self.wake()
                self._wait(lambda: not self._others(me), deadline, "a swap waits for the forwards under way")
            if self.repair is not None:
                self.repair()
        except BaseException:
            self.release_write()
            raise
        return True

    def release_write(self) -> None:
        """End this thread's swap. What it left torn is put in order first, or, if that fails, by who comes next."""
        me = get_ident()
        if self.claim.get("writer") != me:
            return
        try:
            if self.repair is not None and "writing" in self.claim:
                self.repair()
        except BaseException:  # noqa: BLE001 - the error that tore the slots is on its way; this one comes again
            pass
        finally:
            self.turn.update(self.waiting)
            self.claim.clear()
            self.wake()

    def torn_backward(self) -> LockError:
        """What to raise in a backward that computes its forward again, after a swap."""
        return LockError(
            "the slots were written between a forward and the backward of its reentrant checkpoint, which would "
            "compute the forward again with another adapter: swap after the backward"
        )

    def other_factor(self, factor: float) -> LockError:
        """What to raise where a call inside of a hold asks for another scale, which it would have to write."""
        return LockError(
            f"a call asks for the scale {factor:g} inside a hold (or a larger call) of the same thread that began with "
            f"{self.factor:g}: other scales are written to the slots, so leave the hold for it"
        )

    def read(self) -> Held:
        """A forward, or several that have to see the same adapter."""
        return Held(self, writing=False)

    def write(self) -> Held:
        """A swap."""
        return Held(self, writing=True)

    def _due(self) -> bool:
        return any(thread in self.waiting for thread in tuple(self.turn))

    def _others(self, me: int) -> list[int]:
        return [thread for thread in tuple(self.readers.values()) if thread != me]

    def _wait(self, ready: Callable[[], bool], deadline: float, what: str) -> None:
        gate = allocate_lock()
        gate.acquire()
        self.gates[gate] = None
        try:
            while not ready():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LockTimeout(self._told(what))
                if not gate.acquire(timeout=min(left, _SLICE)):
                    self._bury()
        finally:
            self.gates.pop(gate, None)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        for gate in tuple(self.gates):
            with suppress(RuntimeError):  # somebody else was first
                gate.release()

    def _bury(self) -> None:
        """Forget threads that are no more."""
        self.keep(sys._current_frames())

    def keep(self, threads: Collection[int]) -> None:
        """Forget all threads but these."""
        for table in (self.readers, self.waiting, self.turn, self.claim):
            for key, thread in tuple(table.items()):
                if thread not in threads:
                    table.pop(key, None)  # type: ignore[call-overload]

    def _told(self, what: str) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        readers, writers = ({repr(names.get(t, t)) for t in tuple(x.values())} for x in (self.readers, self.claim))
        return (
            f"{what}, longer than {self.timeout:g} seconds. In a forward, a generate or a hold: "
            f"{', '.join(sorted(readers)) or 'no thread'}; swapping or waiting to: "
            f"{', '.join(sorted(writers)) or 'no thread'}. Threads must not wait for each other inside of these: while "
            "one holds the model, others that it waits for can't call it once a swap waits. Where the work is only "
            "long: prepare_hotswap(..., lock_timeout=seconds)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout, self.hold_generate, self.lanes), {"factor": self.factor}


class Held:
    """What a thread does with the model, for ``with``. It ends with this object at the latest."""

    def __init__(self, lock: SwapLock, *, writing: bool) -> None:
        self._lock, self._writing = lock, writing
        self._key = object()  # the lock keeps this, not the Held, which can then go
        self._owns: int | None = None

    def __enter__(self) -> None:
        self._owns = get_ident()
        self.__class__ = _Holding
        try:
            if not self._writing:
                self._lock.acquire_read(self._key)
            elif not self._lock.acquire_write():
                self._owns = None
        except BaseException:
            self._release()
            raise

    def __exit__(self, *error: object) -> None:
        self._release()
        self.__class__ = Held

    def _release(self) -> None:
        if not self._writing:
            self._lock.release_read(self._key)
        elif self._owns == get_ident():
            self._lock.release_write()
        self._owns = None


class _Holding(Held):
    """One that goes on: an interrupt may keep ``with`` from calling ``__exit__``, so the end of the object ends it.

    A class of its own, since an interrupt inside of a ``__del__`` is lost: there is none where there is nothing to do.
    """

    def __del__(self) -> None:
        self._release()


def _inside() -> str:
    told = (
        "a swap inside a forward (a generate, a hold) of the same thread would wait for itself: swap after it. For "
        "swaps between the tokens of a generate: prepare_hotswap(..., hold_generate=False)"
    )
    if asyncio._get_running_loop() is not None:
        told += (
            ". Tasks of one event loop share a thread: await asyncio.to_thread(fxpeft.hotswap, model, ...), and so "
            "with other swaps, waits beside the loop until the hold ends"
        )
    return told


for _function in (SwapLock.reads, SwapLock.acquire_read, SwapLock.wake):  # a compiled model's frames begin behind them
    skip_frame(_function, deep=True)
_locks: WeakSet[SwapLock] = WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    """Let swaps that are writing finish: a child would have their half."""
    _forking.held = []
    for lock in tuple(_locks):
        held = Held(lock, writing=False)
        _forking.held.append(held)
        try:
            held.__enter__()
        except LockTimeout:
            continue


def _after_fork() -> None:
    for held in vars(_forking).pop("held", ()):
        held.__exit__()


def _in_child() -> None:
    for lock in tuple(_locks):
        lock.keep((get_ident(),))
        lock.gates.clear()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
