"""Aten: an adapter's nodes become the program's own sort of nodes, with values, and eject still finds the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from graphs import FORMS, IDS, chains, doubled, lora, matched, snapshot
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from fxpeft.passes import AtenPass, EjectPass, InjectPass, Kind, PassError, Pipeline, RedirectPass, Rewrite
from fxpeft.passes.captured import aten
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
        assert n.op == "get_attr" or not n.meta["val"].requires_grad
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
    assert_close(graph_module(IDS), wanted)
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
        assert_close(graph_module(IDS), other(IDS))
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
    assert_close(graph_module(IDS), wanted)


def lora_of(graph_module: GraphModule, site: str) -> Rewrite:
    return lora(next(TARGET.of(n).kind for n in graph_module.graph.nodes
                     if TARGET.has(n) and TARGET.of(n).site == site))  # fmt: skip


class Alike(nn.Module):
    """Four linears of one form in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 5]``."""
        return self.layers(x).tanh()


SITES = [f"layers.{i}" for i in range(4)]


def alike(form: str, rewrite: Callable[[int], Rewrite]) -> GraphModule:
    """A program of four sites of one form, each with its own rewrite."""
    torch.manual_seed(0)
    program = torch.export.export(Alike().eval(), (torch.randn(3, 5),))
    program = program if form == "aten" else program.run_decompositions()
    graph_module = matched(program.module(), *SITES)
    return Pipeline([InjectPass({site: [rewrite(i)] for i, site in enumerate(SITES)})])(graph_module)


def values(graph_module: GraphModule) -> dict[str, Any]:
    found = {}
    for n in graph_module.graph.nodes:
        value = n.meta.get("val")
        if isinstance(value, Tensor):
            found[n.name] = (value.shape, value.stride(), value.dtype, value.requires_grad, n.meta.get("tensor_meta"))
    return found


def drops(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, drop: Callable[[Tensor], Any]) -> Any:
    h = drop(kind.reduce(x, a))
    return base(x) + kind.reduce(h * x, a) + (h * h).sum()


def square(i: int) -> Rewrite:
    """Rank 5, so that all values have one form; ``h * x`` is not ``h * h``."""
    drop = nn.Dropout(0.25 * (i % 2)).train(i > 1)
    return Rewrite("drops", drops, {"mine.a": nn.Parameter(torch.randn(5, 5)), "mine.drop": drop})


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_sites_of_one_form_are_traced_once_and_come_out_as_if_each_had_been(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, traced = [], []
    make = aten.make_fx
    monkeypatch.setattr(aten, "make_fx", lambda *args, **kwargs: traced.append(1) or make(*args, **kwargs))
    for key in (aten._key, lambda *args: None):
        monkeypatch.setattr(aten, "_key", key)
        graph_module = alike(form, square)
        lowered(graph_module, form)
        made.append((str(graph_module.graph), values(graph_module), len(traced)))
        traced.clear()
    (text, found, few), (each_text, each_found, many) = made
    assert text == each_text
    assert found == each_found
    assert len(found) > 40
    # the dropouts differ in p or mode; all else is alike
    assert many == 4 * 10
    assert few == 7 + 4


def first_rows(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor) -> Tensor:
    return base(x) + kind.reduce(x, a.narrow(0, 0, 5))


@pytest.mark.parametrize("form", DECOMPOSITIONS)
def test_a_view_lies_in_its_own_sites_memory(form: str) -> None:
    graph_module = alike(form, lambda i: Rewrite("first", first_rows, {"mine.a": torch.randn(7, 5)}))
    lowered(graph_module, form)
    narrow = (torch.ops.aten.narrow.default, torch.ops.aten.slice.Tensor)
    views = [n for n in graph_module.graph.nodes if n.target in narrow]
    memory = [n.meta["val"].untyped_storage()._cdata for n in views]
    assert memory == [n.args[0].meta["val"].untyped_storage()._cdata for n in views]
    assert len(set(memory)) == 4
