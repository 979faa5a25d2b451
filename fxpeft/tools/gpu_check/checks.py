"""All checks, in the order in which they run: right or wrong first, then how fast, then what takes longest."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from fxpeft.errors import AdapterError
from fxpeft.tools.gpu_check import bases, compiled, graphs, methods, speed, streams
from fxpeft.tools.gpu_check.check import Check

CHECKS: list[Check] = [
    *methods.CHECKS, *streams.CHECKS, *graphs.CHECKS, *compiled.CHECKS, *bases.CHECKS, *speed.CHECKS, *compiled.SLOW,
]  # fmt: skip


def chosen(only: Collection[str]) -> list[Check]:
    """The checks whose names match one of some globs; all of them without globs.

    Raises:
        AdapterError: a glob matches none.
    """
    for glob in only:
        if not any(fnmatchcase(check.name, glob) for check in CHECKS):
            known = ", ".join(check.name for check in CHECKS)
            raise AdapterError(f"only={glob!r}: expected a check's name, or a glob of some, found none; known: {known}")
    return [check for check in CHECKS if not only or any(fnmatchcase(check.name, glob) for glob in only)]
