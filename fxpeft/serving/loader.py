"""Loads of a store's adapters on threads of its own: read and lowered beside forwards, then handed over whole."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from threading import Condition, get_ident

from torch import nn

from fxpeft.adapters.state import state_of
from fxpeft.checkpoint import Checkpoint
from fxpeft.errors import AdapterError, CheckpointError, FxpeftError, LockError, PassError, StoreTimeout
from fxpeft.serving.handing import build, hand_over
from fxpeft.serving.residents import Entry, Residents, StoreStats, Version, bytes_of
from fxpeft.serving.sources import Failure, Source
from fxpeft.serving.swap import serving_of

numbers = itertools.count(1)  # of versions, over all stores: they are names in a model
LARGER = 4  # that a file can be than what becomes of it: float64 that is served as float16


class Loader:
    """The threads that load, the names that they load for, and what is in memory.

    Args:
        max_bytes, timeout, threads: as of :class:`fxpeft.AdapterStore`.

    ``lock`` is held for whatever reads or changes the names and what is in memory; never while the model's is waited
    for. ``removed``: names of a folder's adapters that aren't served.
    """

    def __init__(self, model: nn.Module, max_bytes: int, timeout: float, threads: int) -> None:
        self.model, self.timeout = model, timeout
        self.lock = Condition()
        self.entries: dict[str, Entry] = {}
        self.removed: set[str] = set()
        self.residents = Residents(max_bytes)
        self.pool = ThreadPoolExecutor(threads, "fxpeft-store")
        self.closed = False

    def check_open(self) -> None:
        """Refuse what a closed store can't do."""
        if self.closed:
            raise AdapterError("the store is closed")

    def close(self) -> None:
        """Forget all names and let the adapters go, those in use when they are given back."""
        with self.lock:
            self.closed = True
            for entry in self.entries.values():
                if entry.version is not None:
                    self.residents.retire(entry.version)
            self.entries.clear()
            self.lock.notify_all()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._sweep()

    def stats(self) -> StoreStats:
        """Counters since the start, and what is in memory now."""
        with self.lock:
            failed = sum(entry.failure is not None and entry.version is None for entry in self.entries.values())
            return self.residents.told(len(self.entries), failed)

    def put(self, name: str, source: Source | None, found: Checkpoint | None) -> Future[None]:
        """Have another version of a name loaded."""
        return self.pool.submit(self.load, name, next(numbers), source, found, put=True)

    def wait(self, future: Future[None], name: str, deadline: float) -> None:
        """Wait for a load.

        Raises:
            StoreTimeout: for too long. LockError: it would be for ever. AdapterError and others: what the load raised.
        """
        if serving_of(state_of(self.model)).lock.reads(get_ident()):
            raise LockError(
                f"{name}: isn't in memory, and to load it inside a forward (a generate, a hold) of the same thread "
                "would wait for itself: name it, or prefetch it, before"
            )
        try:
            future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            if future.done():  # its own
                raise
            raise StoreTimeout(f"{name}: is not loaded yet; {self._busy()}") from None
        except CancelledError:
            self.check_open()
            raise

    def _busy(self) -> str:
        stats = self.stats()
        return (
            f"{stats.resident_bytes:,} of {stats.max_bytes:,} bytes are taken by {stats.residents} adapters, "
            f"{stats.in_use} of them in use"
        )

    def begin(self, name: str, entry: Entry) -> Future[None]:
        """Have an entry's adapter loaded, once however many ask."""
        if (failure := entry.failed()) is not None:
            raise CheckpointError(f"adapter {name!r} is quarantined until its files change: {failure.message}")
        if entry.loading is None:
            entry.failure = None
            entry.loading = self.pool.submit(self._load_known, name, entry)
        return entry.loading

    def _load_known(self, name: str, entry: Entry) -> None:
        try:
            self.load(name, entry.number, entry.source, None, put=False)
        finally:
            with self.lock:
                entry.loading = None

    def load(self, name: str, number: int, source: Source | None, found: Checkpoint | None, *, put: bool) -> None:
        """Read, check, lower and settle an adapter beside forwards, then hand it over, in this order."""
        started, stamp = time.perf_counter(), () if source is None else source.stamp()
        try:
            self.residents.check(name, 0 if source is None else source.bytes() // LARGER)
            adapter = build(self.model, f"{name[:100]}--{next(numbers)}", found or source.read())  # type: ignore[union-attr]
            size = bytes_of(adapter)
            self.residents.check(name, size)
        except (AdapterError, PassError) as error:
            with self.lock:
                self.residents.stats.failures += 1
                entry = self.entries.get(name)
                if entry is not None and entry.number == number and not put:
                    entry.failure = Failure.of(error, stamp)
            raise
        version = Version(name, adapter, size, kept=source is None)
        self._reserve(version)
        self._hand_over(version)
        with self.lock:
            entry = self.entries.get(name)
            if not self.closed and (put if entry is None else entry.number <= number):
                if entry is None or put:
                    before = None if entry is None else entry.version
                    entry = self.entries[name] = Entry(source, number)
                    self.removed.discard(name)
                    if before is not None:
                        self.residents.retire(before)
                self.residents.show(version, entry, time.perf_counter() - started)
            else:
                self.residents.retire(version)  # another one is there since, or the name is gone
        self.sweep_later()

    def _reserve(self, version: Version) -> None:
        """Make room in the budget, by evicting those that nobody uses; waits for such."""
        deadline = time.monotonic() + self.timeout
        with self.lock:
            while not self.residents.reserve(version):
                left = deadline - time.monotonic()
                if left <= 0 or self.closed:
                    raise StoreTimeout(f"{version.name}: no room for its {version.size:,} bytes; {self._busy()}")
                self.lock.wait(min(left, 1.0))

    def _hand_over(self, version: Version | None = None) -> None:
        """Give the model what is new and take from it what is gone: all that waits for forwards under way."""
        with self.lock:
            gone, self.residents.gone = self.residents.gone, []
        try:
            new = [] if version is None else [version.adapter]
            hand_over(self.model, new, [old.adapter for old in gone])
        except BaseException:
            with self.lock:
                self.residents.gone += gone
                if version is not None:
                    self.residents.free(version)
            raise

    def release(self, versions: Iterable[Version]) -> None:
        """Take versions back from a lease."""
        with self.lock:
            for version in versions:
                self.residents.give_back(version)
            self.lock.notify_all()
        self.sweep_later()

    def sweep_later(self) -> None:
        """Take what is gone out of the model, beside the caller, who may be inside a forward."""
        with self.lock:
            if not self.residents.gone:
                return
            if not self.closed:
                self.pool.submit(self._sweep)
                return
        with suppress(FxpeftError):  # inside a forward: the model keeps it
            self._sweep()

    def _sweep(self) -> None:
        if self.residents.gone:
            self._hand_over()
