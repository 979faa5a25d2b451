"""Eject gives back exactly the graph, the attributes and the outputs that inject and redirect were given."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from closeness import assert_close
from graphs import FORMS, IDS, SITES, chains, matched, program, snapshot
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxpeft.passes import EjectPass, InjectPass, Pipeline, RedirectPass


def sites_in_use(graph_module: GraphModule) -> set[str]:
    return {n.split(".")[1] for n, _ in graph_module.named_modules() if n.startswith("adapters.")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sites", [("up",), ("words",), ("up", "down"), SITES], ids="+".join)
def test_ejects_exactly(form: str, sites: tuple[str, ...]) -> None:
    graph_module = matched(FORMS[form]())
    before, output = snapshot(graph_module), graph_module(IDS)
    pipeline = Pipeline([InjectPass(chains(graph_module, *sites)), EjectPass()])
    pipeline.passes[0](graph_module)
    graph_module.recompile()
    assert not torch.allclose(graph_module(IDS), output, atol=0.01)
    result = EjectPass()(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    assert isinstance(result, PassResult)
    assert result.modified
    assert set(result.report.matched) == set(sites)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), output)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["up", "down"])
def test_ejects_one_site_of_a_chain_at_a_time(form: str, first: str) -> None:
    graph_module = matched(FORMS[form]())
    before, output = snapshot(graph_module), graph_module(IDS)
    rewrites = chains(graph_module, "up", "down")
    Pipeline([InjectPass(rewrites)])(graph_module)
    last = "down" if first == "up" else "up"
    pipeline = Pipeline([EjectPass(lambda site: site == first)])
    pipeline(graph_module)
    reasons = {(s.site, s.reason) for s in pipeline.reports[0].skipped}
    assert reasons == {(s, "not selected") for s in SITES if s != first}
    assert sites_in_use(graph_module) == {last}  # the other one's operands are gone
    alone = matched(FORMS[form]())
    Pipeline([InjectPass({last: rewrites[last]})])(alone)
    assert_close(graph_module(IDS), alone(IDS), terms=1)
    Pipeline([EjectPass()])(graph_module)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), output)


@pytest.mark.parametrize("injected", list(itertools.permutations(("words", "up", "down"))), ids="+".join)
def test_the_order_of_injecting_does_not_matter(injected: tuple[str, ...]) -> None:
    graph_module = matched(FORMS["aten"]())
    before = snapshot(graph_module)
    rewrites = chains(graph_module, *injected)
    for site in injected:
        Pipeline([InjectPass({site: rewrites[site]})])(graph_module)
    for site in ("down", "words", "up"):
        Pipeline([EjectPass(lambda name, wanted=site: name == wanted)])(graph_module)
    assert snapshot(graph_module) == before


@pytest.mark.parametrize("form", FORMS)
def test_injects_again_after_ejecting(form: str) -> None:
    graph_module = matched(FORMS[form]())
    rewrites = chains(graph_module, *SITES)
    pipeline = Pipeline([InjectPass(rewrites)])
    output = pipeline(graph_module)(IDS)
    Pipeline([EjectPass(), InjectPass(rewrites)])(graph_module)
    assert torch.equal(graph_module(IDS), output)
    assert pipeline.reports[0].matched == SITES


@pytest.mark.parametrize("form", FORMS)
def test_without_adapters_nothing_changes(form: str) -> None:
    graph_module = matched(FORMS[form]())
    before = snapshot(graph_module)
    result = EjectPass()(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
    assert [(s.site, s.reason) for s in result.report.skipped] == [(s, "holds no adapter") for s in SITES]
    assert snapshot(graph_module) == before


@pytest.mark.parametrize("form", [name for name in FORMS if name != "call_module"])
@pytest.mark.parametrize("injected", [(), ("up", "down")], ids=["alone", "with inject"])
def test_ejects_redirected_reads(form: str, injected: tuple[str, ...]) -> None:
    graph_module = matched(FORMS[form]())
    before, output = snapshot(graph_module), graph_module(IDS)
    redirects = {
        "up": {"bias": ("mine.bias", nn.Parameter(torch.randn(10)))},
        "conv": {"bias": ("mine.bias", torch.randn(6)), "weight": ("mine.weight", torch.randn(6, 2, 3))},
    }
    Pipeline([RedirectPass(redirects), InjectPass(chains(graph_module, *injected))])(graph_module)
    assert not torch.allclose(graph_module(IDS), output, atol=0.01)
    Pipeline([EjectPass(lambda site: site == "conv")])(graph_module)
    assert sites_in_use(graph_module) == {"up", *injected}
    pipeline = Pipeline([EjectPass()])
    pipeline(graph_module)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), output)
    assert not EjectPass()(graph_module).modified


def test_a_module_called_twice() -> None:
    class Twice(nn.Module):
        """Calls one module twice."""

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Twice."""
            return self.lin(self.lin(x).relu())

    graph_module = matched(torch.fx.symbolic_trace(Twice()), "lin")
    before = snapshot(graph_module)
    Pipeline([InjectPass(chains(graph_module, "lin"))])(graph_module)
    assert sites_in_use(graph_module) == {"lin"}
    Pipeline([EjectPass()])(graph_module)
    assert snapshot(graph_module) == before


def test_a_copy_can_be_ejected_too() -> None:
    graph_module = matched(FORMS["call_module"]())
    before = str(graph_module.graph)
    Pipeline([InjectPass(chains(graph_module, *SITES))])(graph_module)
    twin = copy.deepcopy(graph_module)
    Pipeline([EjectPass()])(twin)
    assert str(twin.graph) == before
    assert torch.equal(twin(IDS), program()(IDS))
    assert sites_in_use(graph_module) == set(SITES)  # the original still has them
