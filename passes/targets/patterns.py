"""The target language: say what to adapt by name, kind, class, layer, shape or role, not where it lies.

    role:attention.{query,value} & layers[4:-2]
    kind:linear & ~(name:lm_head | class:Qwen3MoeTopKRouter)
    in>=1024 & out=4096

| term | takes |
| --- | --- |
| ``name:GLOB`` | the whole name; ``*`` is (a piece of) one part, ``**`` any number of parts, ``{q,v}`` either |
| ``re:REGEX`` | the whole name; a ``|`` has to stand in parentheses |
| ``kind:KIND`` | ``linear``, ``embedding``, ``conv``, ``conv1d``, ``conv2d``, ``conv3d`` |
| ``class:CLASS`` | a module of that class or a subclass, and all that lies in one; a glob |
| ``layers[4:-2]`` | the layer's index, as Python slices it: ``layers[-1]``, ``layers[::2]``, ``layers[0,3]`` |
| ``in=4096``, ``out<512`` | features; ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=`` |
| ``role:ROLE`` | what it does in the data flow (``roles.py``); ``role:attention`` takes ``attention.*`` |
| ``q_proj`` | a name or dotted suffix, as an entry of PEFT's ``target_modules`` |

``~`` binds tighter than ``&``, ``&`` tighter than ``|``. The same terms as Python values: ``name(...)``,
``regex(...)``, ``kind(...)``, ``owner(...)``, ``layers[4:-2]``, ``features("in", ">=", 1024)``,
``role(...)``, ``suffix(...)``, joined by the same operators.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from fxpeft.passes.targets.globs import glob as compiled_glob
from fxpeft.passes.targets.regex import DEEPEST, compiled, shown, spend
from fxpeft.passes.targets.terms import (
    COMPARE,
    AllOf,
    AnyOf,
    Features,
    InClass,
    Layers,
    Name,
    Not,
    OfKind,
    OfRole,
    Pattern,
    PatternError,
    Regex,
    Subject,
    Suffix,
    parts_of,
    word_end,
)  # fmt: skip

KINDS = ("linear", "embedding", "conv", "conv1d", "conv2d", "conv3d")
DIGITS = 18  # of a number in a text
LONGEST = 100_000  # characters of a text
SHOWN = 400  # characters of a text around the place that a message points at
_KEYS = ("name", "re", "kind", "class", "role")
#: what no regular expression for a module's name contains: names have no ":" and no "="
_MARK = re.compile(
    rf"(?:^|(?<=[\s&|~(]))(?:(?:{'|'.join(_KEYS)}):|layers\[-?\d*:-?\d*(?::-?\d*)?\]|(?:in|out)(?:[!<>]?=|[<>])\d)"
)


# --- the terms as Python values ---


def name(glob: str) -> Pattern:
    """A glob for the whole name."""
    compiled_glob(glob)
    return Name(glob)


def regex(expression: str) -> Pattern:
    """A regular expression for the whole name."""
    compiled(expression, "re:")
    return Regex(expression)


def suffix(text: str) -> Pattern:
    """A name or dotted suffix."""
    return Suffix(text)


def kind(text: str) -> Pattern:
    """A kind of site; ``PatternError`` where there is none of that name."""
    if text not in KINDS:
        raise PatternError(f"kind: expected one of {', '.join(KINDS)}, found {text!r}")
    return OfKind(text)


def owner(which: type | str) -> Pattern:
    """Modules of a class, and what lies in them. A string is a glob for the class's name."""
    text = which if isinstance(which, str) else which.__name__
    compiled_glob(text)
    return InClass(text)


def role(glob: str) -> Pattern:
    """What a site does in the data flow."""
    compiled_glob(glob)
    return OfRole(glob)


def features(side: str, compare: str, number: int) -> Pattern:
    """Compare ``in`` or ``out`` features with a number."""
    if side not in ("in", "out") or compare not in COMPARE:
        raise PatternError(f"features: expected 'in' or 'out' and one of {' '.join(COMPARE)}, found {side}{compare}")
    return Features(side, compare, number)


class _Layers:
    def __getitem__(self, index: int | slice | tuple[int, ...]) -> Pattern:
        if isinstance(index, slice):
            if index.step == 0:
                raise PatternError("layers: a slice's step can't be zero")
            return Layers((), index.start, index.stop, index.step)
        return Layers(index if isinstance(index, tuple) else (index,))


layers = _Layers()


# --- texts ---


def pattern(value: Pattern | str) -> Pattern:
    """``value`` itself, or the pattern that a text says.

    Raises:
        PatternError: the text is no pattern; the message points at the character.
    """
    return value if isinstance(value, Pattern) else _Parser(value).whole()


def is_pattern(value: object) -> bool:
    """Whether ``value`` says a pattern rather than what PEFT takes.

    A text does where it has a term with ``name:``, ``re:``, ``kind:``, ``class:``, ``role:``, ``in=``,
    ``out=`` or a slice of ``layers``: module names have no colon and no equals sign, so that no regular
    expression for them looks like it.
    """
    return isinstance(value, Pattern) or (isinstance(value, str) and _MARK.search(value) is not None)


def from_peft(targets: str | Collection[str] | Pattern) -> Pattern:
    """PEFT's ``target_modules`` as a pattern; entries that say a pattern are read as one."""
    if isinstance(targets, Pattern):
        return targets
    if isinstance(targets, str):
        return pattern(targets) if is_pattern(targets) else Regex(targets)
    parts = tuple(pattern(t) if is_pattern(t) else Suffix(t) for t in targets)
    return parts[0] if len(parts) == 1 else AnyOf(parts)


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"a pattern of {len(text):,} characters, {shown(text)}; expected at most {LONGEST:,}")
        self.text, self.at, self.depth = text, 0, 0

    def whole(self) -> Pattern:
        found = self.any()
        if self.peek():
            raise self.error("expected '&', '|' or the end")
        return found

    def any(self) -> Pattern:
        return self.joined("|", self.all, AnyOf)

    def all(self) -> Pattern:
        return self.joined("&", self.one, AllOf)

    def joined(self, sign: str, part: Callable[[], Pattern], made: type[AllOf] | type[AnyOf]) -> Pattern:
        parts = [part()]
        while self.peek() == sign:
            self.at += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else made(tuple(p for part in parts for p in parts_of(part, made)))

    def one(self) -> Pattern:
        sign = self.peek()
        if sign not in ("~", "("):
            return self.term()
        start, self.at, self.depth = self.at, self.at + 1, self.depth + 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} parentheses in each other; write it flatter", start)
        if sign == "~":
            found: Pattern = Not((self.one(),))
        else:
            found = self.any()
            if self.peek() != ")":
                raise self.error("this parenthesis is never closed", start)
            self.at += 1
        self.depth -= 1
        return found

    def term(self) -> Pattern:
        start, text = self.at, self.word()
        if not text:
            raise self.error("expected a term")
        if compared := re.fullmatch(r"(in|out)(!=|<=|>=|=|<|>)(.*)", text):
            side, sign, number = compared.groups()
            if not number.isdecimal() or len(number) > DIGITS:
                raise self.error(f"expected a number after {side}{sign}", start + len(side) + len(sign))
            return Features(side, sign, int(number))
        if text.startswith("layers["):
            return self.layers(start, text)
        key, colon, rest = text.partition(":")
        if not colon:
            return Suffix(text)
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {near[0]}:?" if near else ""
            raise self.error(f"expected one of {', '.join(f'{k}:' for k in _KEYS)}{hint}", start)
        if not rest:
            raise self.error(f"expected something after {text}", self.at)
        make: dict[str, Callable[[str], Pattern]] = {
            "name": name, "re": regex, "kind": kind, "class": owner, "role": role,
        }  # fmt: skip
        try:
            return make[key](rest)
        except PatternError as error:
            raise self.error(str(error), start + len(key) + 1) from None

    def layers(self, start: int, text: str) -> Pattern:
        inside = text[len("layers[") : -1]
        place = start + len("layers[")
        if not text.endswith("]"):
            raise self.error("expected ']'", start + len(text))
        if re.fullmatch(rf"-?\d{{1,{DIGITS}}}(,-?\d{{1,{DIGITS}}})*", inside):
            return layers[tuple(int(i) for i in inside.split(","))]
        if not re.fullmatch(rf"(-?\d{{1,{DIGITS}}})?(:(-?\d{{1,{DIGITS}}})?){{1,2}}", inside):
            raise self.error("expected indices as in layers[0,3] or a slice as in layers[4:-2]", place)
        ends = [int(i) if i else None for i in inside.split(":")]
        try:
            return layers[slice(*ends)]
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


def select(wanted: Pattern, subjects: Iterable[Subject], where: str) -> list[Subject]:
    """The subjects that a pattern takes, on the budget of :func:`~fxpeft.passes.targets.regex.limited`."""
    text = str(wanted)
    return [subject for subject in subjects if spend(lambda left: wanted(subject), where, text)]  # noqa: B023


def explain(wanted: Pattern, subjects: Sequence[Subject]) -> list[str]:
    """One line for each term that takes no site, with the nearest that there is; terms behind a ``~`` left out."""
    lines = []
    for term in list(dict.fromkeys(wanted.terms(negated=False)))[:1000]:
        if any(term(s) for s in subjects):
            continue
        words = list(dict.fromkeys(w for s in subjects for w in term.words(s)))
        asked = re.sub(r"[*?{}\\()^$]", "", term.word[:SHOWN])
        ranked = sorted(words, key=lambda w: -difflib.SequenceMatcher(None, asked, w).ratio())
        told = str(term) if len(str(term)) <= SHOWN else f"{str(term)[:SHOWN]}..."
        lines.append(f"{told} matches none of {len(subjects)} sites; nearest: {', '.join(ranked[:5]) or 'none'}")
    return lines


def layers_of(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Name -> its layer's index and the number of layers beside it.

    The layer is the outermost numbered part that lies in a named container, else the outermost
    numbered part.
    """
    found: dict[str, tuple[str, int]] = {}
    for whole in names:
        parts = whole.split(".")
        numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
        if numbered:
            at = next((i for i in numbered if i), numbered[0])
            found[whole] = (".".join(parts[:at]), int(parts[at]))
    count: dict[str, int] = {}
    for container, index in found.values():
        count[container] = max(count.get(container, 0), index + 1)
    return {whole: (index, count[container]) for whole, (container, index) in found.items()}
