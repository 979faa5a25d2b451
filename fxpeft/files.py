"""Files that are written whole or not at all, several together, whoever reads, writes or dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fxpeft.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WAIT = 120.0  # seconds that a save waits for another one into the same folder
_UNFINISHED = ".unfinished-"  # then a random number and the name that the file is to have, with its suffix


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, all or none; see :func:`replacing`."""
    with replacing(*contents) as unfinished:
        for path, content in zip(unfinished, contents.values(), strict=True):
            path.write_bytes(content)


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Empty files beside ``paths``, for the block to write; after it they take the places of those, in order.

    A path that is a link stays one: its target is replaced. A file that is replaced gives the new one its mode, a
    new one has what the process's umask leaves. Everything is on the disk before the first file is replaced, so only
    a process that dies between two of them leaves new and old ones side by side; what :func:`unfinished` finds is
    then the rest. What dead processes left is swept after that. Saves into one folder take turns.

    Raises:
        CheckpointError: something else than a file is there, or another save into the folder takes over two minutes.
        OSError: from the file system, after which every old file is there.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    for path, target in zip(paths, targets, strict=True):
        if os.path.lexists(target) and not target.is_file():
            raise CheckpointError(f"{path}: expected a file, or none, to be written over; found something else")
    folders = sorted({target.parent for target in targets})
    with ExitStack() as turns:
        alone = [turns.enter_context(_turn(folder)) for folder in folders]
        made: dict[Path, int] = {}
        number = secrets.token_hex(8)
        if all(alone):
            _sweep(targets)
        try:
            for target in targets:
                path = _beside(target, number)
                made[path] = 0o600
                made[path] = _create(path, like=target)
            yield list(made)
            for path, mode in made.items():
                _sync(path, mode)
        except BaseException:
            _remove(made)
            raise
        _rename(list(zip(made, targets, strict=True)))
        for folder in folders:
            _sync(folder)
        if all(alone):
            for target in targets:
                _remove(unfinished(target))


def unfinished(path: Path) -> list[Path]:
    """What saves under way, and dead ones, were about to put in a file's place."""
    target = Path(os.path.realpath(path))
    pattern = re.compile(rf"{re.escape(_UNFINISHED)}[0-9a-f]{{16}}-{re.escape(target.name)}")
    return [other for other in target.parent.glob(f"{_UNFINISHED}*") if pattern.fullmatch(other.name)]


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, and let the disk know."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _create(path: Path, like: Path) -> int:
    """An empty file for this process's user alone; returns the mode that it is to have."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the kernel applies the umask
    mode = stat.S_IMODE((like if like.exists() else path).stat().st_mode)
    path.chmod(0o600)
    return mode


def _rename(pairs: Sequence[tuple[Path, Path]]) -> None:
    try:
        for path, target in pairs:
            path.replace(target)
    except BaseException:
        left = [(path, target) for path, target in pairs if path.exists()]
        if len(left) < len(pairs):  # one is in its place, so the others follow, whatever interrupted
            _rename(left)
        else:
            _remove(path for path, _ in left)
        raise


def _sweep(targets: Sequence[Path]) -> None:
    """Remove what dead saves left, but for the newest files of those that had put their first in its place."""
    for path in unfinished(targets[0]):
        _remove(_beside(target, path.name[len(_UNFINISHED) :][:16]) for target in reversed(targets))
    for target in targets[1:]:
        _remove(sorted(unfinished(target), key=lambda path: path.stat().st_mtime_ns)[:-1])


def _beside(target: Path, number: str) -> Path:
    return target.with_name(f"{_UNFINISHED}{number}-{target.name}")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path, mode: int | None = None) -> None:
    """Put a file's content and mode, or a folder's names, on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY if mode is None else os.O_RDWR)
    except PermissionError:
        if mode is None:  # a folder that can't be read, or on Windows any
            return
        raise
    try:
        if mode is not None:
            path.chmod(mode)
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Keep other saves out of a folder; says whether that could be done. A dead process gives its turn back."""
    if fcntl is None or not os.access(folder, os.R_OK):
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end, held = time.monotonic() + WAIT, False
        while not held:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"{folder}: another process or thread has been saving here for {WAIT:.0f} s; save elsewhere, "
                        "or look what holds it"
                    ) from None
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        try:
            yield held
        finally:
            if held:
                fcntl.flock(handle, fcntl.LOCK_UN)  # not only closed: a child forked meanwhile has it open too
    finally:
        os.close(handle)
