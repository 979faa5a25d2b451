"""The target language: say what to adapt by name, kind, class, layer, shape or role, not where it lies.

    role:attention.{query,value} & layers[4:-2]
    kind:linear & ~(name:lm_head | class:Qwen3MoeTopKRouter)
    in>=1024 & out=4096

| term | takes |
| --- | --- |
| ``name:GLOB`` | the whole name; ``*`` is (a piece of) one part, ``**`` any number of parts, ``{q,v}`` either |
| ``re:REGEX`` | the whole name; a ``|`` has to stand in parentheses |
| ``kind:KIND`` | ``linear``, ``embedding``, ``conv``, ``conv1d``, ``conv2d``, ``conv3d``, ``parameter`` |
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
from collections.abc import Collection, Iterable, Sequence

from fxpeft.passes.targets.grammar import KEYS, SHOWN
from fxpeft.passes.targets.names import dotted_ends
from fxpeft.passes.targets.regex import spend
from fxpeft.passes.targets.terms import (
    AnyOf,
    Features,
    InClass,
    Layers,
    Name,
    OfKind,
    OfRole,
    Pattern,
    Regex,
    Subject,
    Suffix,
)
from fxpeft.passes.targets.terms import pattern as pattern
from fxpeft.passes.targets.terms import regex as regex

#: what no regular expression for a module's name contains: names have no ":" and no "="
_MARK = re.compile(
    rf"(?:^|(?<=[\s&|~(]))(?:(?:{'|'.join(KEYS)}):|layers\[-?\d*:-?\d*(?::-?\d*)?\]|(?:in|out)(?:[!<>]?=|[<>])\d)"
)


# --- the terms as Python values ---


def name(glob: str) -> Pattern:
    """A glob for the whole name."""
    return Name(glob)


def suffix(text: str) -> Pattern:
    """A name or dotted suffix."""
    return Suffix(text)


def kind(text: str) -> Pattern:
    """A kind of site; ``PatternError`` where there is none of that name."""
    return OfKind(text)


def owner(which: type | str) -> Pattern:
    """Modules of a class, and what lies in them. A string is a glob for the class's name."""
    return InClass(which if isinstance(which, str) else which.__name__)


def role(glob: str) -> Pattern:
    """What a site does in the data flow."""
    return OfRole(glob)


def features(side: str, compare: str, number: int) -> Pattern:
    """Compare ``in`` or ``out`` features with a number."""
    return Features(side, compare, number)


class _Layers:
    def __getitem__(self, index: int | slice | tuple[int, ...]) -> Pattern:
        return Layers.of(index)


layers = _Layers()


# --- texts ---


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


def select(wanted: Pattern, subjects: Iterable[Subject], where: str) -> list[Subject]:
    """The subjects that a pattern takes, on the budget of :func:`~fxpeft.passes.targets.regex.limited`."""
    text = str(wanted)
    return [subject for subject in subjects if spend(lambda left: wanted(subject), where, text)]  # noqa: B023


def explain(wanted: Pattern, subjects: Sequence[Subject]) -> list[str]:
    """One line for each term that takes no site, with the nearest that there is; terms behind a ``~`` left out."""
    lines = []
    terms = list(dict.fromkeys(wanted.terms(negated=False)))[:1000]
    ends = {end for subject in subjects for end in dotted_ends(subject.name)}
    for term in terms:
        if term.name in ends if isinstance(term, Suffix) else any(term(s) for s in subjects):
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
