"""What a store has in memory: versions of adapters, who uses them, and which goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.passes.torch_private import pytree
from fxpeft.serving.sources import Failure, Source


@dataclass
class StoreStats:
    """What a store has done, and what is in its memory.

    Args:
        names: that are known. residents: versions in memory, of ``resident_bytes``, ``in_use`` of them in use.
        hits, misses: names that were asked for while in memory, or not. loads: into memory, in ``load_seconds`` all
            together. failures: of loads. quarantined: names that aren't served now.
        evictions: for want of room. swaps: blocks that moved adapters into the slots, in ``swap_seconds``.
    """

    names: int = 0
    residents: int = 0
    in_use: int = 0
    resident_bytes: int = 0
    max_bytes: int = 0
    quarantined: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    evictions: int = 0
    swaps: int = 0
    swap_seconds: float = 0.0


@dataclass(eq=False)
class Version:
    """One version of a name's adapter, in memory and in the model.

    Args:
        kept: it can't be read again. users: leases of it. current: it is what its name stands for.
    """

    name: str
    adapter: Adapter
    size: int
    kept: bool
    users: int = 0
    entry: Entry | None = None


@dataclass(eq=False)
class Entry:
    """A name.

    Args:
        source: ``None``: its tensors were given. number: of the last put. wanted: how many wait for it.
    """

    source: Source | None
    number: int
    version: Version | None = None
    loading: Future[None] | None = None
    wanted: int = 0
    failure: Failure | None = None

    def failed(self) -> Failure | None:
        """Why a load would fail, where that is known."""
        known = self.failure is not None and self.source is not None and self.failure.holds(self.source)
        return self.failure if known else None


class Lease:
    """What keeps versions of adapters in memory until it is released; it ends with this object at the latest.

    As a ``with`` block it is released at the block's end.
    """

    def __init__(self, release: Callable[[Iterable[Version]], None], mix: Mapping[str, float]) -> None:
        self._release, self._mix = release, mix
        self._held: dict[str, Version] = {}

    @property
    def lane(self) -> dict[str, float] | None:
        """What :func:`fxpeft.rows` and :func:`fxpeft.tokens` take for it."""
        return self.renamed(self._mix)

    def renamed(self, mix: Mapping[str, float]) -> dict[str, float] | None:
        """A mixture of the store's names by the names that the versions have in the model."""
        return {self._held[name].adapter.name: weight for name, weight in mix.items()} or None

    def acting(self, prompt: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
        """What tokens name of a sequence that begins with these, in order: from which of them on, and what.

        An adapter with an invocation acts from its last occurrence on; where there is none, nowhere.
        """
        starts = {name: _start(version.adapter, prompt) for name, version in self._held.items()}
        places = sorted({0, *(start for start in starts.values() if start is not None)})
        mixes = ({n: w for n, w in self._mix.items() if (at := starts[n]) is not None and at <= p} for p in places)
        return [(place, self.renamed(mix) or {}) for place, mix in zip(places, mixes, strict=True)]

    def prompted(self) -> bool:
        """Whether one of them has a soft prompt."""
        return any(version.adapter.prompt is not None for version in self.versions())

    def versions(self) -> list[Version]:
        """What it holds."""
        return list(self._held.values())

    def add(self, version: Version) -> None:
        """Hold one more, which counts it already."""
        self._held[version.name] = version

    def release(self) -> None:
        """Let the store evict them; a second time does nothing."""
        held, self._held = self._held, {}
        if held:
            self._release(held.values())

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was never made
            self.release()


@dataclass
class Residents:
    """The versions in memory, the one used longest ago first. Its owner's lock is held for every call.

    Args:
        gone: those that nobody uses and no name stands for, which the model has still.
    """

    max_bytes: int
    stats: StoreStats = field(default_factory=StoreStats)
    current: dict[str, Version] = field(default_factory=dict)  # by their names in the model
    old: dict[str, Version] = field(default_factory=dict)  # in use, no longer current
    gone: list[Version] = field(default_factory=list)
    bytes: int = 0

    def told(self, names: int, quarantined: int) -> StoreStats:
        """The counters."""
        versions = [*self.current.values(), *self.old.values()]
        used = sum(version.users > 0 for version in versions)
        return replace(
            self.stats, names=names, quarantined=quarantined, residents=len(versions), in_use=used,
            resident_bytes=self.bytes, max_bytes=self.max_bytes,
        )  # fmt: skip

    def check(self, name: str, size: int) -> None:
        """Refuse what never finds room."""
        if size > self.max_bytes:
            raise AdapterError(f"{name}: {size:,} bytes are more than the store's max_bytes, {self.max_bytes:,}")

    def reserve(self, version: Version) -> bool:
        """Count a version that is about to be shown; others go for it, those of its own name last."""
        over = self.bytes + version.size - self.max_bytes
        order = sorted(self.current.values(), key=lambda each: each.name == version.name)
        out = list[Version]()
        for each in order:
            if over <= 0:
                break
            if not each.users and not each.kept and each.entry is not None and not each.entry.wanted:
                out.append(each)
                over -= each.size
        if over > 0:
            return False
        for each in out:
            self.stats.evictions += 1
            self.retire(each)
        self.bytes += version.size
        return True

    def show(self, version: Version, entry: Entry, seconds: float) -> None:
        """Let an entry's name stand for a version."""
        version.entry, entry.version, entry.failure = entry, version, None
        self.current[version.adapter.name] = version
        self.stats.loads += 1
        self.stats.load_seconds += seconds

    def use(self, version: Version, *, hit: bool) -> Version:
        """Count one more user."""
        self.stats.hits += hit
        self.stats.misses += not hit
        version.users += 1
        self.current[version.adapter.name] = self.current.pop(version.adapter.name)
        return version

    def retire(self, version: Version) -> None:
        """Let no name stand for a version; it goes now, or with its last user."""
        self.current.pop(version.adapter.name, None)
        if version.entry is not None and version.entry.version is version:
            version.entry.version = None
        version.entry = None
        if version.users:
            self.old[version.adapter.name] = version
        else:
            self._go(version)

    def give_back(self, version: Version) -> None:
        """Count one user less."""
        version.users -= 1
        if not version.users and self.old.pop(version.adapter.name, None) is not None:
            self._go(version)

    def free(self, version: Version) -> None:
        """Take back a reservation."""
        self.bytes -= version.size

    def _go(self, version: Version) -> None:
        self.bytes -= version.size
        self.gone.append(version)


def _start(adapter: Adapter, prompt: Sequence[int]) -> int | None:
    """The first token of a prompt that an adapter acts on; ``None``: none."""
    tokens = list(method_of(adapter.config).invocation(adapter.config))
    last = len(prompt) - len(tokens) if tokens else 0
    return next((at for at in range(last, -1, -1) if list(prompt[at : at + len(tokens)]) == tokens), None)


def bytes_of(adapter: Adapter) -> int:
    """The memory of an adapter's tensors, each piece once."""
    held: Any = [*adapter.values.flat().values(), {**adapter.lowered}, adapter.prompt]
    tensors = (t for t in pytree.tree_leaves(held) if isinstance(t, Tensor) and not t.is_meta)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
