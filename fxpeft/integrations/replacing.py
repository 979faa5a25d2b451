"""Names of another library that are replaced while fxpeft is installed there, and given back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NOTHING = object()


class Replaced:
    """What was replaced, in order: owner, name, and what it had itself."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self.before)

    def replace(self, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        """Set names of modules or classes."""
        for owner, name, value in replacements:
            self.before.append((owner, name, vars(owner).get(name, _NOTHING)))
            setattr(owner, name, value)

    def give_back(self) -> None:
        """Set all to what was there before."""
        while self.before:
            owner, name, value = self.before.pop()
            if value is _NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
