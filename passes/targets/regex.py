"""Regular expressions and globs that strangers wrote: Python's syntax and meaning, and no match that hangs.

``re`` says whether a text is an expression; the ``regex`` engine, which takes the same meaning from it and can give
up, matches it. Before either sees a text, its length, its depth and its counted repeats are limited: compiling costs
time and memory too. All matches inside one :func:`limited` block share one budget of time, however many names and
expressions there are. An expression of plain names needs no engine: it is a set.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import regex

from fxpeft.errors import PatternError as PatternError

LONGEST = 10_000  # characters; plain names joined by "|" may be as many as a model has
DEEPEST = 100  # parentheses in each other: the engines' parsers recurse
LARGEST = 20_000  # characters after counted repeats are written out, as the engine does
SECONDS = 1.0  # of this thread's computing time, for all matches of one plan or file

_NAME = r"(?:\w|-|\\[^\w\s])+"
_NAMES = re.compile(rf"{_NAME}(?:\|{_NAME})*")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d*)(,?)(\d*)\}|.", re.DOTALL)


class Budget:
    """Time that is left for matching, and what was prepared for it: see :func:`limited`."""

    def __init__(self) -> None:
        self.left, self.busy = SECONDS, False
        self.kept: dict[int, tuple[object, Any]] = {}

    def keep(self, key: object, make: Callable[[], Any]) -> Any:
        """``make()``, once for this object: it must not change while the budget lasts."""
        if id(key) not in self.kept:
            self.kept[id(key)] = key, make()
        return self.kept[id(key)][1]


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited() -> Iterator[Budget]:
    """Let all matches in the block, or in the decorated function, share one budget; inside another block, that one's.

    Raises:
        PatternError: from a match, where it was spent.
    """
    outer = _current.get()
    budget = outer or Budget()
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


def spend(match: Callable[[float], Any], where: str, text: str) -> Any:
    """``match(seconds left)``, on the budget.

    Raises:
        PatternError: there is no time left; ``where`` and the text are named.
    """
    budget = _current.get() or Budget()
    if budget.busy:  # a part of a match that is on the budget already
        return match(max(budget.left, 1e-3))
    start, budget.busy = time.thread_time(), True
    try:
        found = match(max(budget.left, 1e-3))
    except TimeoutError:
        budget.left = 0.0
    finally:
        budget.busy = False
        budget.left -= time.thread_time() - start
    if budget.left <= 0:
        raise PatternError(
            f"{where}: gave up after {SECONDS:g} s of matching names with {shown(text)}: a repeat inside a repeat, or "
            "many repeats in a row, can be tried in too many ways. Write it without them, or list the names"
        )
    return found


class Expression:
    """One regular expression, compiled.

    Args:
        text: as ``re`` reads it. where: the field that it comes from, for messages.
        form: how it is used, ``%s`` in place of the text.

    Raises:
        PatternError: it is none, or too long, too deep or too large to be run.
    """

    def __init__(self, text: str, where: str, form: str = "%s") -> None:
        self.text, self.where = text, where
        self._names: frozenset[str] | None = None
        if form == "%s" and _NAMES.fullmatch(text):
            self._names = frozenset(re.sub(r"\\(.)", r"\1", text).split("|"))
            return
        _check_size(text, where)
        try:
            # formatted as PEFT does it, so that the same is an expression; a text can't close a parenthesis of the form
            re.compile(text)
            re.compile(form % text)
            self._compiled = regex.compile(_spelled(form % text))
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{where}: {shown(text)} is no regular expression: {error}") from None

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name is what the expression says."""
        if self._names is not None:
            return name in self._names
        matcher = self._compiled.fullmatch
        return spend(lambda left: matcher(name, timeout=left), self.where, self.text) is not None

    def match(self, name: str) -> Any:
        """``re.match``; ``None`` where there is none."""
        matcher = self._compiled.match
        return spend(lambda left: matcher(name, timeout=left), self.where, self.text)


@functools.lru_cache(maxsize=256)
def _cached(text: str, where: str, form: str) -> Expression:
    return Expression(text, where, form)


def compiled(text: str, where: str, form: str = "%s") -> Expression:
    """:class:`Expression`, kept where it is small."""
    return _cached(text, where, form) if len(text) <= LONGEST else Expression(text, where, form)


def shown(text: str, most: int = 120) -> str:
    """A text in quotes, shortened in the middle."""
    return repr(text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}")


def _check_size(text: str, where: str) -> None:
    """Refuse what would take too long or too much memory to compile."""
    if len(text) > LONGEST:
        raise PatternError(
            f"{where}: a regular expression of {len(text):,} characters, {shown(text)}; expected at most {LONGEST:,}. "
            "List the names instead"
        )
    sizes, last, largest = [0], 0, 0  # of the groups that are open; of the item before a repeat
    for token in _TOKEN.finditer(text):
        sign, count = token[0], token[1] is not None and (token[1] or token[3])
        if sign == "(":
            sizes.append(0)
            last = 0
        elif sign == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
        elif count:
            times = max(int(n) if len(n) < 7 else LARGEST for n in (token[1] or "0", token[3] or "0"))
            sizes[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
        else:
            last = 1
            sizes[-1] += 1
        largest = max(largest, sizes[-1])
        if len(sizes) > DEEPEST:
            raise PatternError(
                f"{where}: {shown(text)} has more than {DEEPEST} parentheses in each other; write it flatter"
            )
    if largest > LARGEST:
        raise PatternError(
            f"{where}: the counted repeats of {shown(text)} stand for more than {LARGEST:,} characters; write * or + "
            "in place of large counts"
        )


def _spelled(text: str) -> str:
    """The text as ``regex`` has to see it to mean what ``re`` means: a lone ``{`` is no fuzzy match, ``[[`` no set."""

    def spell(token: re.Match[str]) -> str:
        sign = token[0]
        if sign[0] == "[" and len(sign) > 1:
            return "[" + re.sub(r"(\\.)|\[", lambda m: m[1] or r"\[", sign[1:], flags=re.DOTALL)
        lone = sign == "{" or (token[1] is not None and not (token[1] or token[2]))
        return rf"\{sign}" if lone else sign

    return _TOKEN.sub(spell, text)
