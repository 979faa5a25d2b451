"""Targets are found in every form of graph, with site, kind and input; the rest is left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import FORMS, SITES
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxpeft.passes import Conv, Embedding, Linear, MatchPass, NameSelector, Target
from fxpeft.passes.meta import TARGET


def everything(site: str) -> bool:
    return True


def targets(graph_module: GraphModule) -> list[Target]:
    MatchPass(everything)(graph_module)
    return [TARGET.of(n) for n in graph_module.graph.nodes if TARGET.has(n)]


@pytest.mark.parametrize("form", FORMS)
def test_finds_all_sites(form: str) -> None:
    found = {t.site: t.kind for t in targets(FORMS[form]())}
    words = found.pop("words")
    assert isinstance(words, Embedding)
    assert (words.in_features, words.out_features) == (7, 6)
    assert found == {
        "up": Linear(6, 10), "down": Linear(10, 4), "conv": Conv(4, 6, (3,), *conv_settings(form), groups=2),
    }  # fmt: skip


def conv_settings(form: str) -> tuple[Any, Any, Any]:
    return (1, 1, 1) if form == "functional" else ((1,), (1,), (1,))


@pytest.mark.parametrize("form", FORMS)
def test_reports_and_is_idempotent(form: str) -> None:
    graph_module = FORMS[form]()
    size = len(graph_module.graph.nodes)
    first = MatchPass(NameSelector(["up", "conv"]))(graph_module)
    assert first.modified
    assert first.graph_module is graph_module
    assert first.report.matched == ("up", "conv")
    assert {(s.site, s.reason) for s in first.report.skipped} == {
        ("words", "matches no target"), ("down", "matches no target"),
    }  # fmt: skip
    assert (first.report.nodes_before, first.report.nodes_after) == (size, size)
    second = MatchPass(NameSelector(["up", "conv"]))(graph_module)
    assert not second.modified
    assert second.report.matched == first.report.matched


@pytest.mark.parametrize("form", FORMS)
def test_nothing_selected_changes_nothing(form: str) -> None:
    graph_module = FORMS[form]()
    result = MatchPass(lambda site: False)(graph_module)
    assert not result.modified
    assert [(s.site, s.reason) for s in result.report.skipped] == [(site, "not selected") for site in SITES]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), Conv(4, 6, (3,), (2,), (0,), (1,), 2)),
        (nn.Conv2d(3, 5, (3, 1), padding=(1, 0)), Conv(3, 5, (3, 1), (1, 1), (1, 0), (1, 1), 1)),
        (nn.Conv3d(2, 4, (1, 2, 1), dilation=(1, 2, 1)), Conv(2, 4, (1, 2, 1), (1,) * 3, (0,) * 3, (1, 2, 1), 1)),
    ],
    ids=["conv1d", "conv2d", "conv3d"],
)
@pytest.mark.parametrize("decompose", [False, True])
def test_convolutions_of_every_dimension(module: nn.Module, kind: Conv, decompose: bool) -> None:
    assert isinstance(module.in_channels, int)
    x = torch.randn(2, module.in_channels, *(8 for _ in kind.kernel))
    assert [t.kind for t in targets(torch.fx.symbolic_trace(nn.Sequential(module)))] == [kind]
    program = torch.export.export(nn.Sequential(module), (x,))
    found = targets((program.run_decompositions() if decompose else program).module())
    assert [(t.site, t.kind.name) for t in found] == [("0", kind.name)]
    a = torch.randn(kind.a_shape(2 * kind.groups))
    torch.testing.assert_close(found[0].kind.reduce(x, a), kind.reduce(x, a))  # defaults may be written differently


def test_a_convolution_padded_by_name() -> None:
    module = nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"))
    found = targets(torch.export.export(module, (torch.randn(2, 4, 8),)).module())
    assert found == [Target("0", Conv(4, 6, (3,), (1,), "same", 1, 1))]


def test_options_of_a_look_up() -> None:
    module = nn.Sequential(nn.Embedding(7, 6, padding_idx=2, max_norm=1.5))
    (found,) = targets(torch.fx.symbolic_trace(module))
    assert isinstance(found.kind, Embedding)
    assert dict(found.kind.options)["padding_idx"] == 2
    assert dict(found.kind.options)["max_norm"] == 1.5


class Tied(nn.Module):
    """The head reads the look-up's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to logits."""
        return self.head(self.words(ids))


@pytest.mark.parametrize("decompose", [False, True])
def test_tied_weights_have_their_own_sites(decompose: bool) -> None:
    program = torch.export.export(Tied(), (torch.tensor([[1, 2]]),))
    found = targets((program.run_decompositions() if decompose else program).module())
    assert [(t.site, type(t.kind)) for t in found] == [("words", Embedding), ("head", Linear)]


class Root(nn.Module):
    """Holds weights for the hand-written graphs below."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Module()
        self.site.weight, self.site.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))
        self.site.stored = nn.Parameter(torch.randn(3, 5))


def graph_of(write: Callable[[Graph, Any, Any, Any], Any]) -> GraphModule:
    graph = Graph()
    x, bias, weight = graph.placeholder("x"), graph.get_attr("site.bias"), graph.get_attr("site.weight")
    graph.output(write(graph, x, bias, weight))
    return GraphModule(Root(), graph)


aten = torch.ops.aten
REFUSED: dict[str, tuple[Callable[[Graph, Any, Any, Any], Any], str]] = {
    "computed weight": (
        lambda g, x, b, w: g.call_function(F.linear, (x, g.call_function(torch.mul, (w, 2)), b)),
        "its weight is computed in the graph, not read from a module",
    ),
    "weight from outside": (
        lambda g, x, b, w: g.call_function(F.linear, (x, g.placeholder("w"))),
        "its weight is computed in the graph, not read from a module",
    ),
    "transposed weight": (
        lambda g, x, b, w: g.call_function(F.linear, (x, g.call_method("t", (g.get_attr("site.stored"),)))),
        "its weight is not a plain [out, in] matrix: (3, 5)",
    ),
    "alpha": (
        lambda g, x, b, w: g.call_function(torch.addmm, (b, x, g.call_function(torch.t, (w,))), {"alpha": 2}),
        "addmm with alpha or beta other than 1",
    ),
    "input under another name": (
        lambda g, x, b, w: g.call_function(torch.addmm, (b,), {"mat1": x, "mat2": g.get_attr("site.stored")}),
        "its input is passed under a name other than 'input'",
    ),
    "transposed convolution": (
        lambda g, x, b, w: g.call_function(
            aten.convolution.default, (x, w, b, [1], [0], [1], True, [0], 1)
        ),
        "a transposed convolution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_says_why_a_form_is_left_alone(case: str) -> None:
    write, reason = REFUSED[case]
    graph_module = graph_of(write)
    result = MatchPass(everything)(graph_module)
    assert not result.modified
    assert result.report.matched == ()
    assert [s.reason for s in result.report.skipped] == [reason]


@pytest.mark.parametrize(
    ("write", "index"),
    [
        (lambda g, x, b, w: g.call_function(torch.addmm, (b, x, g.get_attr("site.stored"))), 1),
        (lambda g, x, b, w: g.call_function(torch.addmm, (b, x, g.call_method("t", (w,)))), 1),
        (lambda g, x, b, w: g.call_function(aten.addmm.default, (b, x, g.call_function(aten.t.default, (w,)))), 1),
        (lambda g, x, b, w: g.call_function(aten.mm.default, (x, g.call_function(torch.transpose, (w, 0, 1)))), 0),
        (lambda g, x, b, w: g.call_function(F.linear, (), {"input": x, "weight": w, "bias": b}), 0),
    ],
    ids=["stored in-out", "t method", "aten.t", "mm", "by keyword"],
)
def test_layouts_of_a_matrix(write: Callable[..., Any], index: int) -> None:
    assert targets(graph_of(write)) == [Target("site", Linear(3, 5), index)]


def test_other_modules_are_no_targets() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.LayerNorm(6), nn.ReLU())
    assert targets(torch.fx.symbolic_trace(model)) == []
