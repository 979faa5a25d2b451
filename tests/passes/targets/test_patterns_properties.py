"""Patterns that nobody wrote: their texts are read back as they were, and mean the same, however they are spaced."""

from __future__ import annotations

from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_patterns import SITES

from fxpeft.passes import Pattern, PatternError, pattern
from fxpeft.passes.targets import patterns as p
from fxpeft.passes.targets.operations.registry import kind_names
from fxpeft.passes.targets.terms import COMPARE, Regex

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=150)
STEADY = settings.get_profile("steady")

WORDS = ["model", "layers", "self_attn", "q_proj", "k_proj", "mlp", "up_proj", "lm_head", "0", "3", "Linear", "in"]
GLOBS = st.lists(st.sampled_from([*WORDS, "*", "**", "?", "*_proj", "{q,k}_proj", "{1,3}"]), min_size=1, max_size=4)
REGEXES = st.lists(
    st.sampled_from(["model", r"\.", ".*", "[qk]", "_proj", "(a|b)", "(?:layers)?", r"\d+", "a|b", "|", r"\)", "x{2}"]),
    min_size=1, max_size=4,
)  # fmt: skip
INDICES = st.integers(-5, 5)
ENDS = st.none() | INDICES


@st.composite
def terms(draw: Any) -> Pattern:
    """One term of any sort."""
    sort = draw(st.sampled_from(["name", "re", "suffix", "kind", "class", "role", "layers", "slice", "features"]))
    if sort in ("name", "class", "role"):
        glob = ".".join(draw(GLOBS))
        make = {"name": p.name, "class": p.owner, "role": p.role}[sort]
        return make(glob)
    if sort == "re":
        try:
            return p.regex("".join(draw(REGEXES)))
        except PatternError:  # two quantifiers in a row, say
            assume(False)
    if sort == "suffix":
        return p.suffix(".".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))))
    if sort == "kind":
        return p.kind(draw(st.sampled_from(kind_names())))
    if sort == "layers":
        return p.layers[tuple(draw(st.lists(INDICES, min_size=1, max_size=3)))]
    if sort == "slice":
        return p.layers[slice(draw(ENDS), draw(ENDS), draw(st.none() | INDICES.filter(bool)))]
    side, sign = draw(st.sampled_from(["in", "out"])), draw(st.sampled_from(sorted(COMPARE)))
    return p.features(side, sign, draw(st.integers(0, 60)))


def joined(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    pairs = st.tuples(inner, inner)
    return pairs.map(lambda ab: ab[0] & ab[1]) | pairs.map(lambda ab: ab[0] | ab[1]) | inner.map(lambda a: ~a)


PATTERNS = st.recursive(terms(), joined, max_leaves=8)


def taken(wanted: Pattern) -> list[bool]:
    return [wanted(site) for site in SITES]


@STEADY
@given(PATTERNS)
def test_a_text_is_read_back(wanted: Pattern) -> None:
    again = pattern(str(wanted))
    assert taken(again) == taken(wanted)
    assert str(pattern(str(again))) == str(again)
    if not any(isinstance(term, Regex) and f"re:{term.expression}" != str(term) for term in wanted.terms()):
        assert again == wanted  # an expression that is no single word gets parentheses
        assert str(again) == str(wanted)


@STEADY
@given(PATTERNS, st.randoms(use_true_random=False))
def test_spaces_mean_nothing(wanted: Pattern, random: Any) -> None:
    text = str(wanted)
    spaced = "".join(f"{' ' * random.randint(0, 3)}{sign}" if sign == " " else sign for sign in f"  {text} \n")
    assert pattern(spaced) == pattern(text)


@STEADY
@given(PATTERNS, PATTERNS, PATTERNS)
def test_logic(a: Pattern, b: Pattern, c: Pattern) -> None:
    """Which the printed parentheses have to keep."""
    for left, right in (
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (a & (b | c), a & b | a & c),
        (a | b & c, (a | b) & (a | c)),
        (~~a, a),
    ):
        assert taken(left) == taken(right) == taken(pattern(str(left))) == taken(pattern(str(right)))


@STEADY
@given(st.text(alphabet="q_.*&|~() :=<[]-01inrelayskd", max_size=30))
def test_any_text_is_a_pattern_or_a_patternerror(text: str) -> None:
    try:
        found = pattern(text)
    except PatternError:
        return
    assert taken(pattern(str(found))) == taken(found)
