"""Globs for dotted names, matched in time linear in the name: an automaton whose states are made when they are met."""

from __future__ import annotations

import functools

from fxpeft.passes.targets.regex import PatternError, shown, spend

LONGEST = 1_000
STATES = 4_096  # kept; then they are made anew

_ANY, _IN_PART, _NOTHING = "any", "part", ""  # what a move takes beside one character
_State = frozenset[int]


class Glob:
    """``*``: a piece of one part; ``?``: one character of it; ``**``: any number of parts; ``{a,b}``: either.

    Raises:
        PatternError: a brace is never closed, or the text is too long.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"a glob of {len(text):,} characters, {shown(text)}; expected at most {LONGEST:,}")
        self.text = text
        self._moves: list[list[tuple[str, int]]] = [[]]
        self._end = self._build()
        self._first = self._closed({0})
        self._known: dict[tuple[_State, str], _State] = {}

    def takes(self, name: str) -> bool:
        """Whether the glob says the whole name."""
        return bool(spend(lambda left: self._run(name), "name:, class: or role:", self.text))

    def _run(self, name: str) -> bool:
        state = self._first
        for sign in name:
            after = self._known.get((state, sign))
            if after is None:
                if len(self._known) > STATES:
                    self._known.clear()
                after = self._closed({to for at in state for what, to in self._moves[at] if _fits(what, sign)})
                self._known[state, sign] = after
            state = after
        return self._end in state

    def _closed(self, states: set[int]) -> _State:
        """These and all that are reached from them without a character."""
        waiting = list(states)
        while waiting:
            for what, to in self._moves[waiting.pop()]:
                if what == _NOTHING and to not in states:
                    states.add(to)
                    waiting.append(to)
        return frozenset(states)

    def _add(self, before: int, what: str) -> int:
        """A new state, reached from ``before``."""
        self._moves.append([])
        self._moves[before].append((what, len(self._moves) - 1))
        return len(self._moves) - 1

    def _build(self) -> int:
        """The automaton, each state's moves; returns its last state."""
        text, moves, at, state = self.text, self._moves, 0, 0
        braces: list[tuple[int, list[int]]] = []  # where each began, and where its alternatives ended
        while at < len(text):
            sign = text[at]
            if text.startswith("**.", at) and (at == 0 or text[at - 1] == "."):
                loop = self._add(state, _NOTHING)
                moves[loop].append((_ANY, loop))
                end = self._add(loop, ".")
                moves[state].append((_NOTHING, end))
                state, at = end, at + 3
                continue
            if text[at:] == ".**":
                loop = self._add(state, ".")
                moves[loop].append((_ANY, loop))
                end = self._add(loop, _NOTHING)
                moves[state].append((_NOTHING, end))
                state, at = end, at + 3
                continue
            if sign == "*":
                wide = text.startswith("**", at)
                state = self._add(state, _NOTHING)
                moves[state].append((_ANY if wide else _IN_PART, state))
                at += 1 + wide
                continue
            if sign == "{":
                braces.append((state, []))
                state = self._add(state, _NOTHING)
            elif sign == "," and braces:
                braces[-1][1].append(state)
                state = self._add(braces[-1][0], _NOTHING)
            elif sign == "}" and braces:
                ends = braces.pop()[1]
                state = self._add(state, _NOTHING)
                for end in ends:
                    moves[end].append((_NOTHING, state))
            else:
                state = self._add(state, _IN_PART if sign == "?" else sign)
            at += 1
        if braces:
            raise PatternError("a brace is never closed")
        return state


def _fits(what: str, sign: str) -> bool:
    return what in (sign, _ANY) or (what == _IN_PART and sign != ".")


@functools.lru_cache(maxsize=256)
def glob(text: str) -> Glob:
    """:class:`Glob`, kept."""
    return Glob(text)
