"""A store: more adapters than the slots hold, or memory, by name; each is loaded when it is needed, beside forwards."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.state import state_of
from fxpeft.checkpoint import CONFIG, Checkpoint
from fxpeft.errors import (
    AdapterError,
    UnknownAdapter,
    short,
)
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.wrappers import unwrap
from fxpeft.serving.handing import check_lane, fit
from fxpeft.serving.loader import Loader, numbers
from fxpeft.serving.residents import Entry, Lease, StoreStats
from fxpeft.serving.rows import Lane, mixture, rows, tokens
from fxpeft.serving.sources import Source, within
from fxpeft.serving.swap import serving_of

NAMES = 100_000  # that a store knows at most


class AdapterStore:
    """Adapters by name, of which those in use and the last ones used are in memory.

    A model that is prepared with ``lanes`` computes rows and tokens with them: :meth:`rows` and :meth:`tokens` load
    what is not in memory, and keep it there for the length of a ``with`` block. All methods can be called from any
    thread; none waits for longer than its ``timeout``.

    Args:
        model: prepared with :func:`fxpeft.prepare_hotswap`, with at least two lanes.
        folder: each of its sub-folders that holds an adapter is known by the sub-folder's name, without a call.
        max_bytes: how much memory adapters may take, beside one for each thread that is being loaded. One that is in
            use is never evicted: where all are, a load waits.
        timeout: seconds that a load waits for room, and a caller for a load.
        threads: how many adapters are loaded at a time.

    Raises:
        AdapterError: the model has no lanes, or a number is none that can be.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path | None = None,
        *,
        max_bytes: int = 8 << 30,
        timeout: float = 60.0,
        threads: int = 1,
    ) -> None:
        for what, value, least in (("max_bytes", max_bytes, 1), ("threads", threads, 1), ("timeout", timeout, 0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise AdapterError(f"{what}: expected a number of at least {least}, found {value!r}")
        self.model = unwrap(model)
        if serving_of(state_of(self.model)).board is None:
            raise AdapterError("a store needs lanes: prepare_hotswap(model, lanes=8) for up to eight adapters at once")
        self.folder = None if folder is None else Path(folder).resolve()
        if self.folder is not None and not self.folder.is_dir():
            raise AdapterError(f"{folder}: expected a folder with a sub-folder for each adapter")
        self._loader = Loader(self.model, int(max_bytes), float(timeout), int(threads))

    # --- names ---

    def put(
        self,
        name: str,
        source: str | Path | Mapping[str, Tensor],
        *,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Load an adapter under a name, or another version of it, which is then served to whoever asks next.

        What is under way goes on with the old one. Where anything fails the old one stays, as if nothing had been
        asked. Of several that are put under one name at a moment, the one that was put last stays.

        Args:
            source: a folder or hub id, as in :func:`fxpeft.load_adapter`; or a state_dict with PEFT's keys, with its
                ``config``, which is copied and, having no place to be read from again, never evicted.

        Raises:
            AdapterError: it can't be loaded, or doesn't fit the slots or the budget. StoreTimeout: it took too long.
        """
        check_adapter_name(name)
        found = place = None
        if isinstance(source, Mapping):
            if config is None:
                raise AdapterError(f"{name}: expected a config beside a state_dict")
            found = Checkpoint("the state_dict", copy.copy(config), dict(source))
        else:
            place = Source.of(source, revision=revision, token=token, local_files_only=local_files_only)
        with self._loader.lock:
            self._check_room_for(name)
            future = self._loader.put(name, place, found)
        self._loader.wait(future, name, time.monotonic() + self._seconds(timeout))

    def register(
        self,
        name: str,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Say where a new name's adapter is. It is loaded when it is first asked for.

        Raises:
            AdapterError: the name is there already, or can't be one.
        """
        check_adapter_name(name)
        place = Source.of(source, revision=revision, token=token, local_files_only=local_files_only)
        with self._loader.lock:
            self._check_room_for(name)
            if self._find(name) is not None:
                raise AdapterError(f"there is an adapter named {name!r} already; remove it, or put another version")
            self._loader.entries[name] = Entry(place, next(numbers))
            self._loader.removed.discard(name)

    def remove(self, name: str) -> None:
        """Forget a name. What is under way goes on, and the memory goes with the last that uses it.

        Raises:
            UnknownAdapter: there is none.
        """
        with self._loader.lock:
            entry = self._known(name)
            del self._loader.entries[name]
            if self._in_folder(name) is not None:
                self._loader.removed.add(name)
            if entry.version is not None:
                self._loader.residents.retire(entry.version)
        self._loader.sweep_later()

    def names(self) -> list[str]:
        """All names, those of the folder too."""
        found = set[str]()
        if self.folder is not None:
            with suppress(OSError):
                found = {path.name for path in self.folder.iterdir() if self._in_folder(path.name) is not None}
        with self._loader.lock:
            return sorted(found - self._loader.removed | set(self._loader.entries))

    def loaded(self) -> list[str]:
        """Names that were put or registered, and those that are in memory."""
        with self._loader.lock:
            return sorted(name for name, e in self._loader.entries.items() if e.number or e.version is not None)

    def __contains__(self, name: object) -> bool:
        with self._loader.lock:
            return isinstance(name, str) and self._find(name) is not None

    def quarantined(self) -> dict[str, str]:
        """Names that aren't served, and why: their last load failed. They are tried again when their files change."""
        with self._loader.lock:
            return {name: e.failure.message for name, e in self._loader.entries.items() if e.failure and not e.version}

    def stats(self) -> StoreStats:
        """Counters since the start, and what is in memory now."""
        return self._loader.stats()

    # --- use ---

    def lease(self, lane: Lane, *, timeout: float | None = None) -> Lease:
        """Have what a row is to have in memory until it is given back; its ``lane`` is what rows and tokens name.

        Args:
            lane: as a row of :func:`fxpeft.rows`.

        Raises:
            UnknownAdapter: there is no such name. AdapterError: it can't be served, or rows can't have it so.
            StoreTimeout: it took too long.
        """
        return self._checked(self._lease(mixture(lane), timeout))

    def try_lease(self, lane: Lane) -> Lease | None:
        """:meth:`lease` where nothing has to be waited for, else ``None``: what is missing is not loaded for it."""
        mix = mixture(lane)
        with self._loader.lock:
            if any(self._known(name).version is None for name in mix):
                return None
            return self._checked(self._lease(mix, 0))

    @contextmanager
    def rows(self, names: Sequence[Lane], *, timeout: float | None = None) -> Iterator[None]:
        """:func:`fxpeft.rows` with the store's names."""
        mixtures = [mixture(name) for name in names]
        with self._lease(_weights(mixtures), timeout) as lease:
            with self._timed(rows(self.model, [lease.renamed(mix) for mix in mixtures])):
                yield

    @contextmanager
    def tokens(
        self,
        names: Sequence[Sequence[Lane]],
        virtual: Sequence[Sequence[int]] | None = None,
        *,
        timeout: float | None = None,
    ) -> Iterator[None]:
        """:func:`fxpeft.tokens` with the store's names."""
        found = [[mixture(name) for name in row] for row in names]
        with self._lease(_weights(itertools.chain(*found)), timeout) as lease:
            with self._timed(tokens(self.model, [[lease.renamed(mix) for mix in row] for row in found], virtual)):
                yield

    @contextmanager
    def batch(
        self,
        leases: Sequence[Lease | None],
        acting: Sequence[Lane] | None = None,
        virtual: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """:func:`fxpeft.tokens` of one row, with a lease for each token.

        Args:
            acting: what of each lease's lane acts on its token; all of it by default.
            virtual: the token's place in the soft prompt of its lease, or -1.
        """
        lanes = [None if lease is None else lease.lane for lease in leases] if acting is None else acting
        with self._timed(tokens(self.model, [lanes], None if virtual is None else [virtual])):
            yield

    def fit(self, leases: Iterable[Lease | None]) -> bool:
        """Whether all of these can be in one batch, by the number of lanes and ranks."""
        held = (version for lease in leases if lease is not None for version in lease.versions())
        return fit(self.model, list({version.adapter.name: version.adapter for version in held}.values()))

    def prefetch(self, names: Iterable[str]) -> None:
        """Load these beside what goes on, and don't wait. What fails is quarantined.

        Raises:
            UnknownAdapter: there is no such name.
        """
        with self._loader.lock:
            for name in names:
                entry = self._known(name)
                if entry.version is None and not entry.failed():
                    self._loader.begin(name, entry)

    def close(self) -> None:
        """Forget all names and let the adapters go, those in use when they are given back."""
        self._loader.close()

    def _checked(self, lease: Lease) -> Lease:
        try:
            check_lane(self.model, lease.lane or {}, [version.adapter for version in lease.versions()])
        except BaseException:
            lease.release()
            raise
        return lease

    # --- finding ---

    def _check_room_for(self, name: str) -> None:
        self._loader.check_open()
        if name not in self._loader.entries and len(self._loader.entries) >= NAMES:
            raise AdapterError(f"{name}: the store knows {NAMES:,} names already; remove some")

    def _find(self, name: str) -> Entry | None:
        """A name's entry, made where the folder has one."""
        entry = self._loader.entries.get(name)
        if entry is None and name not in self._loader.removed and (path := self._in_folder(name)) is not None:
            self._check_room_for(name)
            entry = self._loader.entries[name] = Entry(Source.of(path), 0)  # whatever is put comes after it
        return entry

    def _known(self, name: str) -> Entry:
        self._loader.check_open()
        if (entry := self._find(name)) is None:
            raise UnknownAdapter(f"no adapter named {short(name)}")
        return entry

    def _in_folder(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        try:
            path = within(self.folder, check_adapter_name(name))
            return path if (path / CONFIG).is_file() else None
        except AdapterError:
            return None

    # --- loading ---

    def _seconds(self, timeout: float | None) -> float:
        return self._loader.timeout if timeout is None else timeout

    def _lease(self, mix: Mapping[str, float], timeout: float | None) -> Lease:
        if (board := serving_of(state_of(self.model)).board) is not None and len(mix) > board.lanes.count:
            raise AdapterError(f"{len(mix)} adapters at once, more than the {board.lanes.count} lanes: name fewer")
        deadline = time.monotonic() + self._seconds(timeout)
        lease, missing = Lease(self._loader.release, mix), dict[str, tuple[Entry, Future[None]]]()
        try:
            with self._loader.lock:  # what is there stays, and all that is missing is begun before one is waited for
                for name in mix:
                    self._take(name, lease, missing, hit=True)
            while missing:
                name, (_, future) = next(iter(missing.items()))
                self._loader.wait(future, name, deadline)
                with self._loader.lock:
                    missing.pop(name)[0].wanted -= 1
                    self._take(name, lease, missing, hit=False)
        except BaseException:
            with self._loader.lock:
                for entry, _ in missing.values():
                    entry.wanted -= 1
            lease.release()
            raise
        return lease

    def _take(self, name: str, lease: Lease, missing: dict[str, tuple[Entry, Future[None]]], *, hit: bool) -> None:
        """Put an adapter into a lease, or have it loaded; then nobody evicts it before it is taken."""
        entry = self._known(name)
        if entry.version is not None:
            lease.add(self._loader.residents.use(entry.version, hit=hit))
            return
        missing[name] = entry, self._loader.begin(name, entry)
        entry.wanted += 1

    @contextmanager
    def _timed(self, block: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter a block that names rows, and note how long it took where that moved adapters into the slots."""
        board, started = serving_of(state_of(self.model)).board, time.perf_counter()
        before = None if board is None else board.version
        with block:
            if board is not None and board.version != before:
                with self._loader.lock:
                    self._loader.residents.stats.swaps += 1
                    self._loader.residents.stats.swap_seconds += time.perf_counter() - started
            yield


def _weights(mixtures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """All names of some mixtures, each once."""
    return {name: weight for mix in mixtures for name, weight in mix.items()}
