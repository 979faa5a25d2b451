"""The grammar of the target language: a text in; out, what a maker makes of its terms.

It knows no term: which there are, and what they ask, stands in :mod:`fxpeft.passes.targets.terms`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from fxpeft.passes.targets.regex import DEEPEST, PatternError, shown

P = TypeVar("P")
KEYS = ("name", "re", "kind", "class", "role")
DIGITS = 18  # of a number in a text
LONGEST = 100_000  # characters of a text
SHOWN = 400  # characters of a text around the place that a message points at


class Maker(Protocol[P]):
    """What the parts of a text become; each may raise ``PatternError``, which then points at its part."""

    def term(self, key: str, text: str) -> P:
        """``key:text``; a bare word has no key."""

    def layers(self, index: tuple[int, ...] | slice) -> P:
        """``layers[...]``."""

    def features(self, side: str, compare: str, number: int) -> P:
        """``in<512``."""

    def joined(self, sign: str, parts: Sequence[P]) -> P:
        """Two or more parts with ``&`` or ``|`` between."""

    def negated(self, part: P) -> P:
        """``~part``."""


def parse(text: str, maker: Maker[P]) -> P:
    """What ``maker`` makes of a text.

    Raises:
        PatternError: the text is no pattern; the message points at the character.
    """
    return _Parser(text, maker).whole()


class _Parser(Generic[P]):
    """Recursive descent over one text."""

    def __init__(self, text: str, maker: Maker[P]) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"a pattern of {len(text):,} characters, {shown(text)}; expected at most {LONGEST:,}")
        self.text, self.maker, self.at, self.depth = text, maker, 0, 0

    def whole(self) -> P:
        found = self.any()
        if self.peek():
            raise self.error("expected '&', '|' or the end")
        return found

    def any(self) -> P:
        return self.joined("|", self.all)

    def all(self) -> P:
        return self.joined("&", self.one)

    def joined(self, sign: str, part: Callable[[], P]) -> P:
        parts = [part()]
        while self.peek() == sign:
            self.at += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else self.maker.joined(sign, parts)

    def one(self) -> P:
        sign = self.peek()
        if sign not in ("~", "("):
            return self.term()
        start, self.at, self.depth = self.at, self.at + 1, self.depth + 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} parentheses in each other; write it flatter", start)
        if sign == "~":
            found = self.maker.negated(self.one())
        else:
            found = self.any()
            if self.peek() != ")":
                raise self.error("this parenthesis is never closed", start)
            self.at += 1
        self.depth -= 1
        return found

    def term(self) -> P:
        start, text = self.at, self.word()
        if not text:
            raise self.error("expected a term")
        if compared := re.fullmatch(r"(in|out)(!=|<=|>=|=|<|>)(.*)", text):
            side, sign, number = compared.groups()
            if not number.isdecimal() or len(number) > DIGITS:
                raise self.error(f"expected a number after {side}{sign}", start + len(side) + len(sign))
            return self.maker.features(side, sign, int(number))
        if text.startswith("layers["):
            return self.layers(start, text)
        key, colon, rest = text.partition(":")
        if not colon:
            return self.maker.term("", text)
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]}:?" if near else ""
            raise self.error(f"expected one of {', '.join(f'{k}:' for k in KEYS)}{hint}", start)
        if not rest:
            raise self.error(f"expected something after {text}", self.at)
        try:
            return self.maker.term(key, rest)
        except PatternError as error:
            raise self.error(str(error), start + len(key) + 1) from None

    def layers(self, start: int, text: str) -> P:
        inside = text[len("layers[") : -1]
        place = start + len("layers[")
        if not text.endswith("]"):
            raise self.error("expected ']'", start + len(text))
        if re.fullmatch(rf"-?\d{{1,{DIGITS}}}(,-?\d{{1,{DIGITS}}})*", inside):
            return self.maker.layers(tuple(int(i) for i in inside.split(",")))
        if not re.fullmatch(rf"(-?\d{{1,{DIGITS}}})?(:(-?\d{{1,{DIGITS}}})?){{1,2}}", inside):
            raise self.error("expected indices as in layers[0,3] or a slice as in layers[4:-2]", place)
        ends = [int(i) if i else None for i in inside.split(":")]
        try:
            return self.maker.layers(slice(*ends))
        except PatternError as error:
            raise self.error(str(error), place) from None

    def word(self) -> str:
        start = self.at
        try:
            self.at = word_end(self.text, start)
        except PatternError as error:
            raise self.error(str(error), error.at) from None
        return self.text[start : self.at]

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def error(self, what: str, at: int | None = None) -> PatternError:
        at = self.at if at is None else at
        first = max(at - SHOWN // 2, 0) if len(self.text) > SHOWN else 0
        return PatternError(f"{what}\n  {self.text[first : first + SHOWN]}\n  {' ' * (at - first)}^")


def word_end(text: str, start: int) -> int:
    """Where the word that begins at ``start`` ends: at a space or sign that is inside no bracket.

    Raises:
        PatternError: a bracket is never closed; ``at`` is its place.
    """
    at, open_ = start, list[int]()
    while at < len(text):
        sign = text[at]
        if not open_ and (sign.isspace() or sign in "&|~)"):
            break
        if sign == "\\":
            at += 1
        elif sign in "([{":
            open_.append(at)
        elif sign in ")]}" and open_:
            open_.pop()
        at += 1
    if open_:
        raise PatternError("this bracket is never closed", open_[-1])
    return min(at, len(text))
