"""Select modules by name with the exact semantics of PEFT's ``target_modules``.

The rules are those of ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` (PEFT 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from fxpeft.passes.targets.regex import Expression, compiled, limited

EXCLUDED = "matches exclude_modules"  # a reason of NameSelector.why_not
V = TypeVar("V")
Names = str | Collection[str]

#: how PEFT uses the regular expressions of a config's fields; %s stands for the text
FORMS = {
    "rank_pattern": r"(.*\.)?(%s)$",
    "alpha_pattern": r"(.*\.)?(%s)$",
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.",
}
_SIMPLE = re.compile(r"(\^?)((?:\w|[.-]|\\[^\w\s])+)\$?")
_NUMBERED = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def check_expression(text: str, where: str) -> None:
    """``PatternError`` where a text is no regular expression for a field of a config."""
    compiled(text, where, FORMS.get(where, "%s"))


def matches(names: Names, key: str) -> bool:
    """Whether ``names`` takes ``key``; :class:`Selection` is for many keys."""
    return Selection(names)(key)


class Selection:
    """A string is a regular expression for the whole name; a list holds names or dotted suffixes.

    Args:
        where: the field that they come from, for messages.
    """

    def __init__(self, names: Names, where: str = "target_modules") -> None:
        self._names = None if isinstance(names, str) else frozenset(names)
        self._expression = compiled(names, where) if isinstance(names, str) else None

    def __call__(self, key: str) -> bool:
        if self._expression is not None:
            return self._expression.fullmatch(key)
        assert self._names is not None
        return any(end in self._names for end in dotted_ends(key))


class Endings:
    """Which names end in one of these texts, dotted or not."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(texts)
        self._lengths = {len(text) for text in self._texts}

    def of(self, key: str) -> Iterator[str]:
        """Those in which ``key`` ends."""
        tails = (key[len(key) - length :] for length in self._lengths if length <= len(key))
        return (tail for tail in tails if tail in self._texts)

    def __call__(self, key: str) -> bool:
        return next(self.of(key), None) is not None


class PatternTable:
    """The keys of ``rank_pattern`` or ``alpha_pattern``: each matches a name whole or as a dotted suffix.

    A key without a sign of repetition or choice is looked up, so that a key for each of a model's sites costs no more
    per site than one; only the others are matched one after the other.

    Raises:
        PatternError: a key is no regular expression.
    """

    def __init__(self, keys: Iterable[str], where: str = "rank_pattern") -> None:
        self._keys = list(keys)
        self._complex: dict[int, Expression] = {}
        self._used: set[int] = set()  # those that were a first one
        # length and places of the dots that stand for any character -> the other characters -> key, whole name or not
        self._simple: dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, bool]]]]] = {}
        for index, key in enumerate(self._keys):
            if found := _SIMPLE.fullmatch(key):
                signs = re.findall(r"\\?.", found[2])
                free = tuple(at for at, sign in enumerate(signs) if sign == ".")
                text = "".join(sign[-1] for sign in signs if sign != ".")
                shapes = self._simple.setdefault(len(signs), {})
                shapes.setdefault(free, {}).setdefault(text, []).append((index, bool(found[1])))
            else:
                self._complex[index] = compiled(key, where, FORMS["rank_pattern"])

    def first(self, name: str) -> str | None:
        """The first key that matches, or ``None``."""
        best = min(self._looked_up(name), default=len(self._keys))
        tries = (index for index, expression in self._complex.items() if index < best and expression.match(name))
        best = next(tries, best)
        if best == len(self._keys):
            return None
        self._used.add(best)
        return self._keys[best]

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The keys that match none of the names; what :meth:`first` gave for one of them isn't tried again."""
        used = self._used.union(*map(self._looked_up, names))
        left = ((index, expression) for index, expression in self._complex.items() if index not in used)
        used |= {index for index, expression in left if any(expression.match(name) for name in names)}
        return [key for index, key in enumerate(self._keys) if index not in used]

    def _looked_up(self, name: str) -> Iterator[int]:
        for end in dotted_ends(name):
            for free, texts in self._simple.get(len(end), {}).items():
                text = "".join(sign for at, sign in enumerate(end) if at not in free) if free else end
                for index, whole in texts.get(text, ()):
                    if not whole or len(end) == len(name):
                        yield index


def pattern_table(patterns: Mapping[str, object], where: str = "rank_pattern") -> PatternTable:
    """The keys' :class:`PatternTable`, made once inside :func:`~fxpeft.passes.targets.regex.limited`."""
    with limited() as budget:
        table: PatternTable = budget.keep(patterns, lambda: PatternTable(patterns, where))
    return table


def pattern_value(patterns: Mapping[str, V], key: str, default: V, where: str = "rank_pattern") -> V:
    """The value of the first pattern that matches ``key`` whole or as a dotted suffix.

    This is how PEFT reads ``rank_pattern`` and ``alpha_pattern``. Inside
    :func:`~fxpeft.passes.targets.regex.limited` the patterns are compiled once.
    """
    if not patterns:
        return default
    with limited():
        found = pattern_table(patterns, where).first(key)
    return default if found is None else patterns[found]


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

    @cached_property
    def _taken(self) -> Selection:
        return Selection(self.targets, "target_modules")

    @cached_property
    def _excluded(self) -> Selection:
        return Selection(self.exclude, "exclude_modules")

    @cached_property
    def _whole(self) -> frozenset[str]:
        return frozenset() if isinstance(self.targets, str) else frozenset(self.targets)

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.layers or ())

    @cached_property
    def _below(self) -> tuple[frozenset[str], list[Expression]]:
        """Names of one part, and expressions for the others."""
        plain = frozenset(name for name in self.below if re.fullmatch(r"\w+", name))
        rest = [name for name in self.below if name not in plain]
        return plain, [compiled(name, "modules_to_save", FORMS["modules_to_save"]) for name in rest]

    @cached_property
    def _containers(self) -> list[Expression]:
        return [compiled(name, "layers_pattern", FORMS["layers_pattern"]) for name in self.layers_pattern]

    def why_not(self, key: str) -> str | None:
        """``None`` where ``key`` is a target, else the reason why it is not."""
        if self.exclude and self._excluded(key):
            return EXCLUDED
        plain, expressions = self._below
        if (plain and not plain.isdisjoint(key.split("."))) or any(each.match(key) for each in expressions):
            return "lies in modules_to_save"
        if not self._taken(key):
            return "matches no target"
        # PEFT: a name given in full, or a regular expression, is not filtered by layer
        if isinstance(self.targets, str) or key in self._whole or not self.layers:
            return None
        index = self._layer_index(key)
        if index is None:
            return "has no layer index, and layers_to_transform asks for one"
        return None if index in self._layers else f"layer {index} is not in layers_to_transform"

    def __call__(self, key: str) -> bool:
        return self.why_not(key) is None

    def select(self, names: Iterable[str]) -> list[str]:
        """The targets among ``names``, in their order."""
        return [name for name in names if self(name)]

    def _layer_index(self, key: str) -> int | None:
        tries = (each.match(key) for each in self._containers)
        found = next((m for m in tries if m), None) if self.layers_pattern else _NUMBERED.match(key)
        return int(found["idx"]) if found else None


def dotted_ends(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
