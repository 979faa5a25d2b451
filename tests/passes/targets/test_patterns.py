"""The target language: what each term takes, how texts are read, where PEFT's meaning stays."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fxpeft.passes import MatchPass, Pattern, PatternError, pattern
from fxpeft.passes.targets import patterns as p
from fxpeft.passes.targets.operations import Conv, Embedding, Linear
from fxpeft.passes.targets.patterns import explain, from_peft, is_pattern, layers_of
from fxpeft.passes.targets.terms import Subject

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(4)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
ROLES = {"q": "attention.query", "k": "attention.key", "o": "attention.output", "up": "mlp.up", "down": "mlp.down"}
SITES = [
    Subject(
        name,
        Linear(48, 32) if "down" in name else Linear(32, 48 if "up" in name else 16),
        ("Linear", "LlamaMLP" if "mlp" in name else "LlamaAttention", "LlamaDecoderLayer"),
        (ROLES[name.split(".")[-1].partition("_")[0]],),
        layers_of(NAMES)[name],
    )
    for name in NAMES
] + [
    Subject("model.embed_tokens", Embedding(40, 32), ("Embedding",), ("embedding.token",)),
    Subject("model.patch", Conv(3, 32, (4, 4)), ("Conv2d",)),
    Subject("lm_head", Linear(32, 40), ("Linear",), ("lm_head",)),
]


def taken(text: str | Pattern) -> set[str]:
    """Short names of what a pattern takes: ``0.q_proj``."""
    return {re.sub(r"model\.layers\.(\d)\.\w+\.", r"\1.", s.name) for s in SITES if pattern(text)(s)}


def each(*parts: str, layers: str = "0123") -> set[str]:
    return {f"{i}.{part}" for i in layers for part in parts}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name:model.layers.*.self_attn.{q,k}_proj", each("q_proj", "k_proj")),
        ("name:**.o_proj", each("o_proj")),
        ("name:**.layers.{1,3}.**", each("q_proj", "k_proj", "o_proj", "up_proj", "down_proj", layers="13")),
        ("name:*", {"lm_head"}),
        ("name:model.*", {"model.embed_tokens", "model.patch"}),
        ("name:model.layers.?.mlp.*", each("up_proj", "down_proj")),
        ("name:**lm_head", {"lm_head"}),
        (r"re:.*layers\.[02]\..*\.(q|k)_proj", each("q_proj", "k_proj", layers="02")),
        ("kind:conv", {"model.patch"}),
        ("kind:conv2d", {"model.patch"}),
        ("kind:conv1d", set()),
        ("kind:embedding", {"model.embed_tokens"}),
        ("class:LlamaMLP", each("up_proj", "down_proj")),
        ("class:*Attention & ~k_proj", each("q_proj", "o_proj")),
        ("layers[1:-1] & o_proj", each("o_proj", layers="12")),
        ("layers[-1] & o_proj", each("o_proj", layers="3")),
        ("layers[::2] & o_proj", each("o_proj", layers="02")),
        ("layers[::-2] & o_proj", each("o_proj", layers="13")),
        ("layers[0,-1] & o_proj", each("o_proj", layers="03")),
        ("layers[9] & o_proj", set()),
        ("in=48", each("down_proj")),
        ("in>=40 & out<40", each("down_proj") | {"model.embed_tokens"}),
        ("out!=16 & kind:linear & ~class:LlamaMLP", {"lm_head"}),
        ("role:attention", each("q_proj", "k_proj", "o_proj")),
        ("role:attention.{query,output}", each("q_proj", "o_proj")),
        ("role:*.up", each("up_proj")),
        ("role:lm_head", {"lm_head"}),
        ("q_proj", each("q_proj")),
        ("proj", set()),
        ("mlp.up_proj | lm_head", each("up_proj") | {"lm_head"}),
        ("q_proj | k_proj & layers[0:1]", each("q_proj") | {"0.k_proj"}),
        ("(q_proj | k_proj) & layers[0:1]", {"0.q_proj", "0.k_proj"}),
        ("~(kind:linear | kind:conv)", {"model.embed_tokens"}),
        ("~~lm_head", {"lm_head"}),
    ],
)
def test_what_a_pattern_takes(text: str, expected: set[str]) -> None:
    assert taken(text) == expected
    again = pattern(str(pattern(text)))
    assert again == pattern(text)
    assert taken(again) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (p.name("**.q_proj") & p.layers[4:-2], "name:**.q_proj & layers[4:-2]"),
        (p.role("mlp") | "q_proj", "role:mlp | q_proj"),
        ("q_proj" | p.role("mlp"), "q_proj | role:mlp"),
        ("kind:linear" & ~p.owner(nn.Linear), "kind:linear & ~class:Linear"),
        (p.kind("linear") & (p.suffix("a") | "b"), "kind:linear & (a | b)"),
        (~(p.suffix("a") & "b"), "~(a & b)"),
        (p.features("in", ">=", 8) & p.layers[-1], "in>=8 & layers[-1]"),
        (p.layers[0, 3] | p.layers[::2], "layers[0,3] | layers[::2]"),
        (p.regex("a|b"), "re:(?:a|b)"),
        (p.regex(r"(a|b)\)"), r"re:(a|b)\)"),
        (p.suffix("a") | "b" | ("c" | p.suffix("d")), "a | b | c | d"),
        (p.suffix("a") & ("b & c"), "a & b & c"),
    ],
)
def test_python_values_and_texts_say_the_same(value: Pattern, text: str) -> None:
    assert str(value) == text
    assert [pattern(text)(s) for s in SITES] == [value(s) for s in SITES]
    assert str(pattern(str(value))) == text


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("", 0, "expected a term"),
        ("role:mlp &", 10, "expected a term"),
        ("role:mlp & | x", 11, "expected a term"),
        ("role:mlp kind:linear", 9, "expected '&', '|' or the end"),
        ("(role:mlp | x", 0, "this parenthesis is never closed"),
        ("role:mlp)", 8, "expected '&'"),
        ("kind:lineer", 5, "kind: expected one of linear, embedding, conv, .*found 'lineer'"),
        ("x & nam:a", 4, "expected one of name:, .*did you mean name:"),
        ("name:", 5, "expected something after name:"),
        ("x | re:a[", 8, "this bracket is never closed"),
        ("x | re:a**", 7, "is no regular expression"),
        ("in=many", 3, "expected a number after in="),
        ("x & layers[a:b]", 11, "expected indices"),
        ("layers[::0]", 7, "step can't be zero"),
        ("name:{a,b", 5, "this bracket is never closed"),
        ("name:x}{", 7, "never closed"),
    ],
)
def test_an_error_points_at_the_character(text: str, at: int, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        pattern(text)
    *_, shown, pointer = str(caught.value).split("\n")
    assert shown == f"  {text}"
    assert pointer == " " * (at + 2) + "^"


@pytest.mark.parametrize(
    "text",
    [
        "q_proj", ".*q_proj", r".*\.layers\.[0-9]\..*", "all-linear", "layers[0]", "layers[0-9]+", r"(?:a|b)\.c",
        r"(?P<name>a)", r"(?!kind)x", r"(?<=in)x", r"a(?=b)", "re", "^model.*(q|v)_proj$", r"model\.layers[0:1]",
        "named", "in", r"(?i:q_proj)", r"x(?<!in=)y",
    ],
)  # fmt: skip
def test_what_stays_pefts_regular_expression(text: str) -> None:
    assert not is_pattern(text)
    assert str(from_peft(text)).startswith("re:")


@pytest.mark.parametrize(
    "text",
    ["name:a", "(role:a)", "x & kind:linear", "~class:A", "layers[4:-2]", "x & layers[:1]", "in=4", "x|out>=4", "re:a"],
)
def test_what_says_a_pattern(text: str) -> None:
    assert is_pattern(text)
    assert from_peft(text) == pattern(text)


def test_pefts_lists_are_one_front_end() -> None:
    assert taken(from_peft(["q_proj", "lm_head"])) == each("q_proj") | {"lm_head"}
    assert taken(from_peft(["q_proj", "role:mlp.up & layers[0:1]"])) == each("q_proj") | {"0.up_proj"}
    assert taken(from_peft(r".*\.(q|k)_proj")) == each("q_proj", "k_proj")
    assert taken(from_peft(p.role("mlp.up"))) == each("up_proj")


def test_layers_are_counted_in_the_outermost_named_container() -> None:
    names = ["0.enc.layer.0.a", "0.enc.layer.11.a.2.b", "enc.block.1.layer.7.q", "3", "0", "plain", "2.x"]
    assert layers_of(names) == {
        "0.enc.layer.0.a": (0, 12), "0.enc.layer.11.a.2.b": (11, 12), "enc.block.1.layer.7.q": (1, 2),
        "3": (3, 4), "0": (0, 4), "2.x": (2, 4),
    }  # fmt: skip


def test_reasons_name_the_term() -> None:
    site = SITES[0]
    assert pattern("q_proj & layers[0:2]").why_not(site) is None
    assert pattern("role:attention & layers[2:]").why_not(site) == "is not layers[2:]"
    assert pattern("~q_proj").why_not(site) == "is q_proj"
    assert pattern("a | b").why_not(site) == "is none of a | b"


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("role:attention.qury", "attention.query"),
        ("class:LlamaMPL", "LlamaMLP"),
        ("name:model.layers.*.self_atn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("q_porj", "q_proj"),
        ("kind:conv1d", "conv2d"),
        ("layers[7:9]", "layers[0:4]"),
        ("in=4096", "in="),
    ],
)
def test_a_term_that_takes_nothing_is_told_with_what_is_near(text: str, nearest: str) -> None:
    (line,) = explain(pattern(f"{text} | lm_head"), SITES)
    assert line.startswith(f"{text} matches none of {len(SITES)} sites; nearest: {nearest}")
    assert explain(pattern(f"lm_head & ~{text}"), SITES) == []


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + x


def test_match_pass_takes_a_pattern_on_graphs_of_both_kinds() -> None:
    net = nn.Sequential(Inner(), Inner(), nn.Linear(4, 2))
    symbolic = torch.fx.symbolic_trace(net)
    exported = torch.export.export(net, (torch.ones(1, 4),)).module()
    for graph, text, expected in [
        (symbolic, "in=4 & layers[0:-1]", ("0.first", "1.first")),
        (exported, "in=4 & layers[0:-1]", ("0.first", "1.first")),
        (symbolic, "class:Linear & out=2", ("2",)),
        (exported, "class:Inner & in=6", ("0.second", "1.second")),
    ]:
        report = MatchPass(pattern(text))(graph).report
        assert report.matched == expected
        assert len(report.matched) + len(report.skipped) == 5
