"""Redirect: reads of an attribute become reads of an operand; every one of them, and only those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from graphs import FORMS, IDS, lora, matched, program
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import InjectPass, PassError, Pipeline, RedirectPass
from fxpeft.passes.meta import OPERAND, REDIRECT, TARGET

READING = [form for form in FORMS if form != "call_module"]
BIAS, WEIGHT = torch.arange(10.0) / 3, torch.linspace(-1, 2, 6 * 2 * 3).view(6, 2, 3)
REDIRECTS = {"up": {"bias": ("mine.bias", nn.Parameter(BIAS))}, "conv": {"weight": ("mine.weight", WEIGHT)}}


def wanted() -> Tensor:
    """The program with those values in the place of its own."""
    changed = program()
    with torch.no_grad():
        changed.up.bias.copy_(BIAS)
        changed.conv.weight.copy_(WEIGHT)
        return changed(IDS)  # type: ignore[no-any-return]


def text(graph_module: GraphModule) -> str:
    return str(graph_module.graph)


class Tied(nn.Module):
    """One bias, read by two functions through two reads, and one weight with two users of one read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lin.weight
        return F.linear(F.linear(x, weight, self.lin.bias).tanh(), weight, self.lin.bias)


@pytest.mark.parametrize("form", READING)
def test_rewritten(form: str) -> None:
    graph_module = matched(FORMS[form]())
    result = RedirectPass(REDIRECTS)(graph_module)
    assert result.modified
    assert result.report.matched == ("up.bias", "conv.weight")
    assert result.report.nodes_after == result.report.nodes_before + 2
    new = {n.target: n for n in graph_module.graph.nodes if REDIRECT.has(n)}
    assert set(new) == {"adapters.up.mine.bias", "adapters.conv.mine.weight"}
    assert all(n.op == "get_attr" and OPERAND.of(n) and n.users for n in new.values())
    olds = [n for n in graph_module.graph.nodes if n.name in {REDIRECT.of(m) for m in new.values()}]
    assert len(olds) == 2  # they stay, for eject
    assert not any(n.users for n in olds)
    assert set(dict(graph_module.named_parameters())) - set(dict(FORMS[form]().named_parameters())) == {
        "adapters.up.mine.bias",
    }  # fmt: skip
    assert "adapters.conv.mine.weight" not in graph_module.state_dict()


@pytest.mark.parametrize("form", READING)
def test_numerics(form: str) -> None:
    graph_module = matched(FORMS[form]())
    before = graph_module(IDS)
    Pipeline([RedirectPass(REDIRECTS)])(graph_module)
    assert_close(graph_module(IDS), wanted(), terms=1)
    assert not torch.allclose(graph_module(IDS), before, atol=0.1)


@pytest.mark.parametrize("form", READING)
def test_unchanged(form: str) -> None:
    graph_module = matched(FORMS[form]())
    assert not RedirectPass({})(graph_module).modified
    Pipeline([RedirectPass(REDIRECTS)])(graph_module)
    before = text(graph_module)
    result = RedirectPass(REDIRECTS)(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
    assert text(graph_module) == before


def test_several_users_and_several_reads() -> None:
    graph_module = torch.fx.symbolic_trace(Tied())
    last = next(n for n in reversed(graph_module.graph.nodes) if n.op == "call_function")
    with graph_module.graph.inserting_before(last):
        last.update_arg(2, graph_module.graph.get_attr("lin.bias"))  # the tracer reads it once
    assert sum(n.target == "lin.bias" for n in graph_module.graph.nodes) == 2
    bias, weight = torch.randn(5), torch.randn(5, 5)
    Pipeline([RedirectPass({"lin": {"bias": ("b", bias), "weight": ("w", weight)}})])(graph_module)
    x = torch.randn(3, 5)
    expected = F.linear(F.linear(x, weight, bias).tanh(), weight, bias)
    torch.testing.assert_close(graph_module(x), expected)


@pytest.mark.parametrize("first", ["redirect", "inject"])
def test_in_a_chain_with_inject(first: str) -> None:
    """Both orders give one program: the adapter's low rank on top of its own bias and weight."""
    graph_module = matched(FORMS["functional"]())
    kinds = {TARGET.of(n).site: TARGET.of(n).kind for n in graph_module.graph.nodes if TARGET.has(n)}
    passes = [RedirectPass(REDIRECTS), InjectPass({site: [lora(kinds[site])] for site in ("up", "down")})]
    Pipeline(passes if first == "redirect" else passes[::-1])(graph_module)
    other = matched(FORMS["functional"]())
    with torch.no_grad():
        other.get_parameter("up.bias").copy_(BIAS)
        other.get_parameter("conv.weight").copy_(WEIGHT)
    Pipeline([InjectPass({site: [lora(kinds[site])] for site in ("up", "down")})])(other)
    assert_close(graph_module(IDS), other(IDS), terms=1)
    assert not torch.allclose(graph_module(IDS), wanted(), atol=0.01)


@pytest.mark.parametrize(("site", "name"), [("up", "gain"), ("nowhere", "bias")])
def test_what_the_graph_does_not_read_is_refused(site: str, name: str) -> None:
    graph_module = matched(FORMS["functional"]())
    before = text(graph_module)
    with pytest.raises(PassError, match=f"site '{site}': the graph doesn't read '{name}' on its own.*bias='none'"):
        RedirectPass({site: {name: ("x", torch.ones(3))}}).call(graph_module)
    assert text(graph_module) == before
    module = matched(FORMS["call_module"]())
    with pytest.raises(PassError, match="site 'up': the graph doesn't read 'bias' on its own"):
        RedirectPass(REDIRECTS).call(module)
    assert not hasattr(module, "adapters")
