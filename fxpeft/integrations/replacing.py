"""Names of another library that are replaced while fxpeft is installed there, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


class Replaced:
    """What was replaced, in order: owner, name, and what it had itself.

    Args:
        replacements: what an installation replaces: owner, name, value. also, undo: what else it does, and its inverse.
    """

    def __init__(
        self,
        replacements: Callable[[], Iterable[tuple[Any, str, Any]]],
        also: Callable[[], None] = lambda: None,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self.replacements, self.also, self.undo = replacements, also, undo
        self.before: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Replace all, or nothing after an error; twice is once."""
        if self.before:
            return
        try:
            self.replace(list(self.replacements()))
            self.also()
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """The inverse of :meth:`install`."""
        while self.before:
            owner, name, value = self.before.pop()
            if value is _NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self.undo()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Installed inside a ``with`` block; then as before, installed or not."""
        before = bool(self.before)
        try:
            self.install()
            yield
        finally:
            (self.install if before else self.uninstall)()

    def replace(self, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        """Set names of modules or classes."""
        for owner, name, value in replacements:
            self.before.append((owner, name, vars(owner).get(name, _NOTHING)))
            setattr(owner, name, value)
