"""Where a store's adapters come from, how it is seen that files are other ones now, and which paths are let in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fxpeft import checkpoint
from fxpeft.checkpoint import CONFIG, PICKLE, WEIGHTS, Checkpoint
from fxpeft.errors import AdapterError, short

FILES = (CONFIG, WEIGHTS, PICKLE)
RETRY = 60.0  # seconds after which what a disk or a network may have been to blame for is tried again


@dataclass(frozen=True)
class Source:
    """A folder or an id on the hub, which an adapter is read from as often as it has to be.

    Args:
        place, revision, token, local_files_only: as in :func:`fxpeft.load_adapter`; a folder is absolute.
    """

    place: str
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @classmethod
    def of(cls, place: str | Path, **settings: str | bool | None) -> Source:
        """The source at a place; a folder is the same one wherever the process goes."""
        path = Path(place)
        return cls(str(path.resolve() if path.exists() else place), **settings)  # type: ignore[arg-type]

    def read(self) -> Checkpoint:
        """The adapter's config and tensors, in memory of their own.

        Raises:
            CheckpointError: missing, damaged or foreign files.
        """
        return checkpoint.read(
            self.place, revision=self.revision, token=self.token, local_files_only=self.local_files_only
        )

    def bytes(self) -> int:
        """Of the files in a folder; of an id none."""
        return sum(size for _, _, size, _ in self.stamp()[1:])

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """What is another one where a folder or its files are others, or were written to; of an id always the same."""
        found: list[tuple[str, int, int, int]] = []
        for path in (Path(self.place), *(Path(self.place) / name for name in FILES)):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)


@dataclass(frozen=True)
class Failure:
    """Why an adapter is not to be served: its last load failed, with the files as they were then.

    Args:
        until: when it is tried again whatever its files are; ``None``: when they are others.
    """

    message: str
    stamp: tuple[object, ...]
    until: float | None

    @classmethod
    def of(cls, error: Exception, stamp: tuple[object, ...]) -> Failure:
        """What is remembered of an error. An id on the hub has no files to look at, and a disk may be well again."""
        again = not stamp or isinstance(error.__cause__, OSError)
        return cls(str(error), stamp, time.monotonic() + RETRY if again else None)

    def holds(self, source: Source) -> bool:
        """Whether a load would only fail again."""
        return source.stamp() == self.stamp and (self.until is None or time.monotonic() < self.until)


def within(folder: Path, path: str | Path) -> Path:
    """The path of an adapter's folder below ``folder``, links followed, those of its files too.

    Args:
        path: relative to ``folder``, or absolute.

    Raises:
        AdapterError: it leads elsewhere, or is no path.
    """
    try:
        root = folder.resolve()
        found = (root / path).resolve()
        outside = [p for p in (found, *((found / name).resolve() for name in FILES)) if not p.is_relative_to(root)]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise AdapterError(f"{short(str(path))}: expected a path below {folder}: {error}") from error
    if outside:
        raise AdapterError(f"{short(str(path))}: expected a path below {folder}, found one that leads elsewhere")
    return found
