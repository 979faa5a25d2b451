"""Select modules by name with the exact semantics of PEFT's ``target_modules``.

The rules are those of ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` (PEFT 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

V = TypeVar("V")
Names = str | Collection[str]


def matches(names: Names, key: str) -> bool:
    """A string is a regular expression for the whole name; a list holds names or dotted suffixes."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return key in names or any(key.endswith(f".{name}") for name in names)


def pattern_value(patterns: Mapping[str, V], key: str, default: V) -> V:
    """The value of the first pattern that matches ``key`` whole or as a dotted suffix.

    This is how PEFT reads ``rank_pattern`` and ``alpha_pattern``.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


@dataclass(frozen=True)
class NameSelector:
    """Which module names are targets, and why the others are not.

    Args:
        targets: names or dotted suffixes, or one regular expression for the whole name.
        exclude: the same forms; wins over ``targets``.
        below: names of modules that are kept out with all that is below them (``modules_to_save``).
        layers: layer indices that a suffix match must have; ``None`` takes all.
        layers_pattern: names of the containers whose index counts; empty takes the first
            numbered part of the name.
    """

    targets: Names
    exclude: Names = ()
    below: Collection[str] = ()
    layers: Collection[int] | None = None
    layers_pattern: Collection[str] = ()

    def why_not(self, key: str) -> str | None:
        """``None`` where ``key`` is a target, else the reason why it is not."""
        if self.exclude and matches(self.exclude, key):
            return "matches exclude_modules"
        if any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in self.below):
            return "lies in modules_to_save"
        if not matches(self.targets, key):
            return "matches no target"
        # PEFT: a name given in full, or a regular expression, is not filtered by layer
        if isinstance(self.targets, str) or key in self.targets or not self.layers:
            return None
        index = self._layer_index(key)
        if index is None:
            return "has no layer index, and layers_to_transform asks for one"
        return None if index in self.layers else f"layer {index} is not in layers_to_transform"

    def __call__(self, key: str) -> bool:
        return self.why_not(key) is None

    def select(self, names: Iterable[str]) -> list[str]:
        """The targets among ``names``, in their order."""
        return [name for name in names if self(name)]

    def _layer_index(self, key: str) -> int | None:
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", key)
        else:
            tries = (re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", key) for p in self.layers_pattern)
            found = next((m for m in tries if m), None)
        return int(found["idx"]) if found else None
