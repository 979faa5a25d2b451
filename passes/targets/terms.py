"""The terms of the target language: questions to one site, joined by ``&``, ``|`` and ``~``."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxpeft.passes.targets.globs import glob
from fxpeft.passes.targets.grammar import parse, word_end
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import matches
from fxpeft.passes.targets.operations.registry import kind_names
from fxpeft.passes.targets.regex import PatternError as PatternError
from fxpeft.passes.targets.regex import compiled

COMPARE: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a pattern can ask about one site.

    Args:
        name: dotted. kind: ``None`` where no rewrite can take it.
        classes: names of its own class and of those around it, bases included.
        roles: what it does in the data flow.
        layer: its layer's index and how many layers its container holds.
    """

    name: str
    kind: Kind | None = None
    classes: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    layer: tuple[int, int] | None = None


class Pattern(abc.ABC):
    """A predicate on sites. ``str(it)`` is its text; :func:`pattern` reads it back."""

    binds = 3  # how tightly its text holds together: "|" 0, "&" 1, "~" 2, a term 3
    parts: tuple[Pattern, ...] = ()

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @abc.abstractmethod
    def why_not(self, subject: Subject) -> str | None:
        """``None`` where the pattern takes ``subject``, else the reason why not."""

    def __call__(self, subject: Subject) -> bool:
        return self.why_not(subject) is None

    def __and__(self, other: Pattern | str) -> Pattern:
        return AllOf((*parts_of(self, AllOf), *parts_of(pattern(other), AllOf)))

    def __or__(self, other: Pattern | str) -> Pattern:
        return AnyOf((*parts_of(self, AnyOf), *parts_of(pattern(other), AnyOf)))

    def __rand__(self, other: str) -> Pattern:
        return pattern(other) & self

    def __ror__(self, other: str) -> Pattern:
        return pattern(other) | self

    def __invert__(self) -> Pattern:
        return Not((self,))

    def terms(self, *, negated: bool = True) -> Iterator[Term]:
        """Its terms, with or without those behind a ``~``."""
        for part in self.parts:
            yield from part.terms(negated=negated)


class Term(Pattern):
    """One question to a site."""

    def terms(self, *, negated: bool = True) -> Iterator[Term]:
        yield self

    def why_not(self, subject: Subject) -> str | None:
        return None if self.takes(subject) else f"is not {self}"

    @abc.abstractmethod
    def takes(self, subject: Subject) -> bool:
        """The answer."""

    def words(self, subject: Subject) -> Iterable[str]:
        """What could have been meant: the values of this kind that the site has."""
        return [subject.name]

    @property
    def word(self) -> str:
        """What was asked for, to compare with :meth:`words`."""
        return str(self).partition(":")[2]


@dataclass(frozen=True)
class AllOf(Pattern):
    """Takes what each of its parts takes."""

    parts: tuple[Pattern, ...]
    binds = 1

    def __str__(self) -> str:
        return " & ".join(_enclosed(p, 1) for p in self.parts)

    def why_not(self, subject: Subject) -> str | None:
        return next((why for p in self.parts if (why := p.why_not(subject))), None)


@dataclass(frozen=True)
class AnyOf(Pattern):
    """Takes what one of its parts takes."""

    parts: tuple[Pattern, ...]
    binds = 0

    def __str__(self) -> str:
        return " | ".join(_enclosed(p, 0) for p in self.parts)

    def why_not(self, subject: Subject) -> str | None:
        return None if any(p(subject) for p in self.parts) else f"is none of {self}"


@dataclass(frozen=True)
class Not(Pattern):
    """Takes what its part does not take."""

    parts: tuple[Pattern, ...]
    binds = 2

    def __str__(self) -> str:
        return f"~{_enclosed(self.parts[0], 2)}"

    def why_not(self, subject: Subject) -> str | None:
        return f"is {self.parts[0]}" if self.parts[0](subject) else None

    def terms(self, *, negated: bool = True) -> Iterator[Term]:
        if negated:
            yield from super().terms()


@dataclass(frozen=True)
class Name(Term):
    """``name:``, a glob for the whole name."""

    glob: str

    def __post_init__(self) -> None:
        glob(self.glob)

    def __str__(self) -> str:
        return f"name:{self.glob}"

    def takes(self, subject: Subject) -> bool:
        return glob(self.glob).takes(subject.name)


@dataclass(frozen=True)
class Regex(Term):
    """``re:``, a regular expression for the whole name."""

    expression: str

    def __str__(self) -> str:
        return f"re:{self.expression}" if _closed(self.expression) else f"re:(?:{self.expression})"

    def takes(self, subject: Subject) -> bool:
        return compiled(self.expression, "re:").fullmatch(subject.name)


@dataclass(frozen=True)
class Suffix(Term):
    """A bare name: PEFT's ``target_modules=[...]``."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def word(self) -> str:
        return self.name

    def takes(self, subject: Subject) -> bool:
        return matches((self.name,), subject.name)

    def words(self, subject: Subject) -> Iterable[str]:
        return [subject.name.rpartition(".")[2]]


@dataclass(frozen=True)
class OfKind(Term):
    """``kind:``, what a kind of target is called."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in kind_names():
            raise PatternError(f"kind: expected one of {', '.join(kind_names())}, found {self.kind!r}")

    def __str__(self) -> str:
        return f"kind:{self.kind}"

    def takes(self, subject: Subject) -> bool:
        return subject.kind is not None and self.kind in (subject.kind.name, subject.kind.family)

    def words(self, subject: Subject) -> Iterable[str]:
        return [subject.kind.name] if subject.kind else []


@dataclass(frozen=True)
class InClass(Term):
    """``class:``, the site's own class, one of its bases, or the class of a module around it."""

    glob: str

    def __post_init__(self) -> None:
        glob(self.glob)

    def __str__(self) -> str:
        return f"class:{self.glob}"

    def takes(self, subject: Subject) -> bool:
        return any(map(glob(self.glob).takes, subject.classes))

    def words(self, subject: Subject) -> Iterable[str]:
        return subject.classes


@dataclass(frozen=True)
class OfRole(Term):
    """``role:``, a role or the family before its dot."""

    glob: str

    def __post_init__(self) -> None:
        glob(self.glob)

    def __str__(self) -> str:
        return f"role:{self.glob}"

    def takes(self, subject: Subject) -> bool:
        return any(glob(self.glob).takes(part) for r in subject.roles for part in (r, r.partition(".")[0]))

    def words(self, subject: Subject) -> Iterable[str]:
        return subject.roles


@dataclass(frozen=True)
class Layers(Term):
    """``layers[...]``: indices, or one slice."""

    indices: tuple[int, ...] = ()
    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.step == 0:
            raise PatternError("layers: a slice's step can't be zero")

    @classmethod
    def of(cls, index: int | slice | tuple[int, ...]) -> Layers:
        """What stands in the brackets."""
        if isinstance(index, slice):
            return cls((), index.start, index.stop, index.step)
        return cls(index if isinstance(index, tuple) else (index,))

    def __str__(self) -> str:
        if self.indices:
            return f"layers[{','.join(map(str, self.indices))}]"
        ends = [("" if v is None else str(v)) for v in (self.start, self.stop, self.step)]
        return f"layers[{':'.join(ends if self.step is not None else ends[:2])}]"

    def takes(self, subject: Subject) -> bool:
        if subject.layer is None:
            return False
        index, count = subject.layer
        if self.indices:
            return index in self.indices or index - count in self.indices
        return index in range(*slice(self.start, self.stop, self.step).indices(count))

    def words(self, subject: Subject) -> Iterable[str]:
        return [] if subject.layer is None else [f"layers[0:{subject.layer[1]}]"]

    @property
    def word(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Features(Term):
    """``in=`` and ``out=``."""

    side: str
    compare: str
    number: int

    def __post_init__(self) -> None:
        if self.side not in ("in", "out") or self.compare not in COMPARE:
            found = f"{self.side}{self.compare}"
            raise PatternError(f"features: expected 'in' or 'out' and one of {' '.join(COMPARE)}, found {found}")

    def __str__(self) -> str:
        return f"{self.side}{self.compare}{self.number}"

    def takes(self, subject: Subject) -> bool:
        return subject.kind is not None and COMPARE[self.compare](self._own(subject.kind), self.number)

    def _own(self, kind: Kind) -> int:
        return kind.in_features if self.side == "in" else kind.out_features

    def words(self, subject: Subject) -> Iterable[str]:
        return [f"{self.side}={self._own(subject.kind)}"] if subject.kind else []

    @property
    def word(self) -> str:
        return str(self)


def regex(expression: str) -> Pattern:
    """A regular expression for the whole name, as ``re:`` says one.

    Raises:
        PatternError: it is none.
    """
    compiled(expression, "re:")
    return Regex(expression)


# --- texts ---

_TERMS: Mapping[str, Callable[[str], Pattern]] = {
    "": Suffix, "name": Name, "re": regex, "kind": OfKind, "class": InClass, "role": OfRole,
}  # fmt: skip


def pattern(value: Pattern | str) -> Pattern:
    """``value`` itself, or the pattern that a text says.

    Raises:
        PatternError: the text is no pattern; the message points at the character.
    """
    return value if isinstance(value, Pattern) else parse(value, _Maker())


class _Maker:
    """The terms, for the grammar."""

    def term(self, key: str, text: str) -> Pattern:
        return _TERMS[key](text)

    def layers(self, index: tuple[int, ...] | slice) -> Pattern:
        return Layers.of(index)

    def features(self, side: str, compare: str, number: int) -> Pattern:
        return Features(side, compare, number)

    def joined(self, sign: str, parts: Sequence[Pattern]) -> Pattern:
        made: type[AllOf] | type[AnyOf] = AllOf if sign == "&" else AnyOf
        return made(tuple(p for part in parts for p in parts_of(part, made)))

    def negated(self, part: Pattern) -> Pattern:
        return Not((part,))


def parts_of(whole: Pattern, made: type[AllOf] | type[AnyOf]) -> tuple[Pattern, ...]:
    """The parts of a pattern that is joined that way, so that joins of joins stay flat."""
    return whole.parts if isinstance(whole, made) else (whole,)


def _enclosed(part: Pattern, binds: int) -> str:
    return f"({part})" if part.binds < binds or (part.binds == binds and binds < 2) else str(part)


def _closed(expression: str) -> bool:
    """Whether the expression reads as one word."""
    try:
        return word_end(expression, 0) == len(expression)
    except PatternError:
        return False
