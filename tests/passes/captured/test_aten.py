"""Aten: an adapter's nodes become the program's own sort of nodes, with values, and eject still finds the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import FORMS, IDS, chains, doubled, lora, matched, snapshot
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from fxpeft.passes import AtenPass, EjectPass, InjectPass, Kind, PassError, Pipeline, RedirectPass, Rewrite
from fxpeft.passes.meta import OPERAND, ORIGIN, SITE, TARGET

#: form -> what its programs keep: all composite operators, or none
DECOMPOSITIONS: dict[str, Callable[[], Any]] = {
    "aten": lambda: None, "core aten": torch.export.default_decompositions,
}  # fmt: skip


def aten_pass(graph_module: GraphModule, form: str, **options: Any) -> AtenPass:
    mode = detect_fake_mode([n.meta["val"] for n in graph_module.graph.nodes if "val" in n.meta])
    assert mode is not None
    return AtenPass(mode, DECOMPOSITIONS[form](), **options)


def lowered(graph_module: GraphModule, form: str, **options: Any) -> Any:
    """The pass's result, linted and compiled."""
    made = aten_pass(graph_module, form, **options)
    with made.fake_mode:
        result = made(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return result


def injected(form: str, rewrites: Callable[[GraphModule], Any]) -> GraphModule:
    graph_module = matched(FORMS[form]())
    return Pipeline([InjectPass(rewrites(graph_module))])(graph_module)


def one(site: str, rewrite: Rewrite) -> Callable[[GraphModule], Any]:
    return lambda graph_module: {site: [rewrite]}


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_rewritten(form: str) -> None:
    """``up`` has a second user; ``words`` and ``conv`` are of other kinds."""
    graph_module = injected(form, lambda gm: chains(gm, "up", "words", "conv"))
    python = [n.name for n in graph_module.graph.nodes if SITE.has(n) and "val" not in n.meta]
    result = lowered(graph_module, form)
    assert result.modified
    assert set(result.report.matched) == set(python)
    ours = [n for n in graph_module.graph.nodes if SITE.has(n)]
    assert len(ours) > 12
    for n in ours:
        assert isinstance(n.meta["val"], Tensor)
        assert n.op == "get_attr" if OPERAND.has(n) else isinstance(n.target, torch._ops.OpOverload)
    if form == "core aten":
        core = {torch.ops.aten.linear.default, torch.ops.aten.matmul.default}
        assert not core & {n.target for n in graph_module.graph.nodes}
    names = {n.name for n in graph_module.graph.nodes}
    origins = [ORIGIN.of(n) for n in graph_module.graph.nodes if ORIGIN.has(n)]
    assert len(origins) == 3
    assert {name for origin in origins for name in (origin.input, origin.output)} <= names


@pytest.mark.parametrize("form", DECOMPOSITIONS)
@pytest.mark.parametrize("sites", [("up",), ("up", "down"), ("words", "up", "down", "conv")], ids="+".join)
def test_numerics_and_back(form: str, sites: tuple[str, ...]) -> None:
    """A chain of sites, each with a chain of rewrites."""
    bare = matched(FORMS[form]())
    before, bare_output = snapshot(bare), bare(IDS)
    graph_module = injected(form, lambda gm: chains(gm, *sites))
    wanted = graph_module(IDS)
    assert not torch.allclose(wanted, bare_output, atol=0.01)
    lowered(graph_module, form)
    torch.testing.assert_close(graph_module(IDS), wanted, rtol=0, atol=1e-5)
    for n in graph_module.graph.nodes:  # the values' shapes are those that a run has
        if n.op == "output":
            continue
        assert "val" in n.meta or n.op == "call_module", n
    Pipeline([EjectPass()])(graph_module)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), bare_output)


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_unchanged(form: str) -> None:
    graph_module = matched(FORMS[form]())
    before = snapshot(graph_module)
    result = lowered(graph_module, form)
    assert not result.modified
    assert result.graph_module is graph_module
    assert snapshot(graph_module) == before
    Pipeline([InjectPass(chains(graph_module, "up"))])(graph_module)
    lowered(graph_module, form)
    text = str(graph_module.graph)
    assert not lowered(graph_module, form).modified
    assert str(graph_module.graph) == text


def test_a_redirected_read_has_a_value() -> None:
    graph_module = matched(FORMS["aten"]())
    bias = nn.Parameter(torch.linspace(-1, 2, 10))
    Pipeline([RedirectPass({"up": {"bias": ("own.bias", bias)}})])(graph_module)
    wanted = graph_module(IDS)
    result = lowered(graph_module, "aten")
    (read,) = [n for n in graph_module.graph.nodes if n.target == "adapters.up.own.bias"]
    assert result.report.matched == (read.name,)
    assert read.meta["val"].shape == (10,)
    assert torch.equal(graph_module(IDS), wanted)


def narrowed(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, carrier: Tensor) -> Tensor:
    """Reads a size and uses only so many rows."""
    return base(x) + kind.reduce(x, a.narrow(0, 0, carrier.size(0))).sum()


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_a_symbolic_operand(form: str) -> None:
    """Its size stays a symbol within its bounds, so one program serves every rank."""
    a, carrier = torch.randn(8, 6), torch.empty(3, 0)
    rewrite = Rewrite("narrowed", narrowed, {"mine.a": a, "mine.carrier": carrier})
    graph_module = injected(form, one("up", rewrite))
    lowered(graph_module, form, symbolic=[carrier], max_size=8)
    (read,) = [n for n in graph_module.graph.nodes if str(n.target).endswith("carrier")]
    size = read.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    assert (bounds.lower, bounds.upper) == (2, 8)
    wanted = FORMS[form]()
    for rank in (3, 7, 2):
        graph_module.adapters.up.mine.carrier = torch.empty(rank, 0)
        other = Pipeline([InjectPass({"up": [Rewrite("n", narrowed, {
            "mine.a": a, "mine.carrier": torch.empty(rank, 0)})]})])(matched(FORMS[form]()))  # fmt: skip
        torch.testing.assert_close(graph_module(IDS), other(IDS), rtol=0, atol=1e-5)
        assert not torch.allclose(graph_module(IDS), wanted(IDS), atol=0.01)


def own_tensor(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return base(x) * torch.tensor([1.0, 2.0]).sum()


def no_tensor(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return base(x) + x.dim()


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (own_tensor, "site 'linear': a rewrite that makes tensors of its own can't go into a program"),
        (no_tensor, "site 'linear': .* computes no tensor; write it without"),
    ],
)
def test_what_a_program_can_not_hold_is_refused(rewrite: Any, message: str) -> None:
    graph_module = injected("aten", one("up", Rewrite("odd", rewrite)))
    made = aten_pass(graph_module, "aten")
    with made.fake_mode, pytest.raises(PassError, match=message):
        made.call(graph_module)


def test_a_rewrite_without_operands_and_one_of_the_same_name() -> None:
    graph_module = injected("aten", lambda gm: {"up": [Rewrite("double", doubled)], "down": [lora_of(gm, "down")]})
    wanted = graph_module(IDS)
    lowered(graph_module, "aten")
    torch.testing.assert_close(graph_module(IDS), wanted, rtol=0, atol=1e-5)


def lora_of(graph_module: GraphModule, site: str) -> Rewrite:
    return lora(next(TARGET.of(n).kind for n in graph_module.graph.nodes
                     if TARGET.has(n) and TARGET.of(n).site == site))  # fmt: skip
