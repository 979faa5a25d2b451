"""Inject and redirect: rewritten, unchanged, numerics, several users, a chain, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from graphs import FORMS, IDS, SITES, doubled, halved_input, lora, matched, program
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import (
    Conv,
    InjectPass,
    Linear,
    MatchPass,
    PassError,
    Pipeline,
    RedirectPass,
    Rewrite,
    graph_text,
)
from fxpeft.passes.meta import REWRITE, SITE, TARGET

READ = [name for name in FORMS if name != "call_module"]  # forms that read each bias on its own


def kinds(graph_module: GraphModule) -> dict[str, Any]:
    return {TARGET.of(n).site: TARGET.of(n).kind for n in graph_module.graph.nodes if TARGET.has(n)}


def inject(graph_module: GraphModule, *sites: str) -> dict[str, Rewrite]:
    """Give the sites a LoRA each; returns them."""
    found = kinds(matched(graph_module))
    rewrites = {site: lora(found[site], seed=i) for i, site in enumerate(sites)}
    Pipeline([InjectPass({k: [v] for k, v in rewrites.items()})])(graph_module)
    return rewrites


def expected(rewrites: dict[str, Rewrite]) -> Tensor:
    """The program's formula written out, every update as a matrix product or a plain convolution."""
    model = program()
    factors = {site: {k[5:]: v.detach() for k, v in r.operands.items()} for site, r in rewrites.items()}

    def update(site: str, x: Tensor) -> Any:
        if site not in factors:
            return 0.0
        a, b, scale = (factors[site][k] for k in ("a", "b", "scale"))
        if site == "words":
            return scale * a.t()[x] @ b.t()
        if site == "conv":
            return scale * F.conv1d(F.conv1d(x, a, padding=1), b, groups=2)
        return scale * x @ (b @ a).t()

    words = model.words(IDS) + update("words", IDS)
    h = model.up(words) + update("up", words)
    y = (model.down(h) + update("down", h)).transpose(1, 2)
    return model.conv(y) + update("conv", y) + h.mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sites", [("up",), ("words",), ("conv",), ("up", "down"), SITES], ids="+".join)
def test_numerics_are_the_formulas(form: str, sites: tuple[str, ...]) -> None:
    """``up`` has two users, ``up`` and ``down`` are a chain."""
    graph_module = FORMS[form]()
    bare = graph_module(IDS)
    rewrites = inject(graph_module, *sites)
    wanted = expected(rewrites)
    assert float((wanted - bare).detach().abs().max()) > 0.05
    assert_close(graph_module(IDS), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_the_site_is_rewritten(form: str) -> None:
    graph_module = FORMS[form]()
    kind = kinds(matched(graph_module))["up"]
    (target,) = (n for n in graph_module.graph.nodes if TARGET.get(n) and TARGET.of(n).site == "up")
    users = set(target.users)
    size = len(graph_module.graph.nodes)
    result = InjectPass({"up": [lora(kind)]})(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    assert result.report.matched == ("up",)
    assert {(s.site, s.reason) for s in result.report.skipped} == {(s, "has no rewrite") for s in SITES if s != "up"}
    assert (result.report.nodes_before, result.report.nodes_after) == (size, len(graph_module.graph.nodes))
    new = [n for n in graph_module.graph.nodes if SITE.get(n) == target.name]
    assert len(new) == result.report.nodes_after - size
    assert all(REWRITE.of(n) == ("lora:mine",) for n in new)
    assert users.isdisjoint(target.users)  # they all read the sum now
    assert {n.target for n in new if n.op == "get_attr"} == {f"adapters.up.mine.{o}" for o in ("a", "b", "scale")}


@pytest.mark.parametrize("form", FORMS)
def test_without_rewrites_nothing_changes(form: str) -> None:
    graph_module = matched(FORMS[form]())
    before = str(graph_module.graph)
    result = InjectPass({"elsewhere": [Rewrite("double", doubled)]})(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
    assert str(graph_module.graph) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_second_run_changes_nothing(form: str) -> None:
    graph_module = FORMS[form]()
    rewrites = inject(graph_module, "up", "conv")
    before = str(graph_module.graph)
    again = [MatchPass(lambda site: True), InjectPass({k: [v] for k, v in rewrites.items()})]
    for each in again:
        result = each(graph_module)
        assert not result.modified
    assert ("up", "is rewritten already; eject it first") in [(s.site, s.reason) for s in result.report.skipped]
    assert str(graph_module.graph) == before


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_operands(form: str) -> None:
    graph_module = FORMS[form]()
    rewrites = inject(graph_module, "up", "conv")
    graph_module(IDS).sum().backward()
    for rewrite in rewrites.values():
        for name in ("mine.a", "mine.b"):
            assert float(rewrite.operands[name].grad.abs().max()) > 0, name


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Both calls on the way to the output."""
        return self.out(self.lin(torch.relu(self.lin(x))))


@pytest.mark.parametrize("trace", ["fx", "export", "core aten"])
def test_a_module_called_twice_is_rewritten_twice(trace: str) -> None:
    model, x = Twice(), torch.randn(2, 6)
    if trace == "fx":
        graph_module = torch.fx.symbolic_trace(model)
    else:
        exported = torch.export.export(model, (x,))
        graph_module = (exported if trace == "export" else exported.run_decompositions()).module()
    rewrite = lora(Linear(6, 6))
    pipeline = Pipeline([MatchPass(lambda site: site == "lin"), InjectPass({"lin": [rewrite]})])
    pipeline(graph_module)
    assert pipeline.reports[1].matched == ("lin", "lin")
    a, b = (rewrite.operands[f"mine.{k}"] for k in "ab")
    weight = model.lin.weight + 1.75 * b @ a
    h = F.linear(torch.relu(F.linear(x, weight, model.lin.bias)), weight, model.lin.bias)
    assert_close(graph_module(x), model.out(h))


@pytest.mark.parametrize("form", FORMS)
def test_rewrites_of_one_site_compose_in_order(form: str) -> None:
    """Each takes the one before as its base: 2 (base(x / 2) + BA(x / 2)), then BA(x) of another."""
    graph_module = FORMS[form]()
    kind = kinds(matched(graph_module))["down"]
    first, last = lora(kind, "first", seed=1), lora(kind, "last", seed=2)
    chain = [first, Rewrite("half", halved_input), Rewrite("double", doubled), last]
    Pipeline([InjectPass({"down": chain})])(graph_module)
    model = program()
    h = model.up(model.words(IDS))
    a, b, c, d = (r.operands[f"{n}.{k}"] for r, n in ((first, "first"), (last, "last")) for k in "ab")
    y = 2 * (model.down(h / 2) + 1.75 * (h / 2) @ (b @ a).t()) + 1.75 * h @ (d @ c).t()
    wanted = model.conv(y.transpose(1, 2)) + h.mean()
    assert_close(graph_module(IDS), wanted)


@pytest.mark.parametrize("order", [("up", "down"), ("down", "up")], ids="+".join)
def test_sites_rewritten_one_after_the_other(order: tuple[str, ...]) -> None:
    graph_module = FORMS["aten"]()
    found = kinds(matched(graph_module))
    rewrites = {site: lora(found[site], seed=i) for i, site in enumerate(order)}
    for site in order:
        Pipeline([InjectPass({site: [rewrites[site]]})])(graph_module)
    assert_close(graph_module(IDS), expected(rewrites))


def test_a_module_as_operand() -> None:
    graph_module = FORMS["aten"]()
    kind = kinds(matched(graph_module))["up"]
    Pipeline([InjectPass({"up": [lora(kind, drop=nn.Threshold(0.0, 0.5))]})])(graph_module)
    assert "adapters.up.mine.drop" in dict(graph_module.named_modules())
    rewrite = lora(kind)
    model = program()
    words = model.words(IDS)
    low = F.threshold(1.75 * F.linear(words, rewrite.operands["mine.a"]), 0.0, 0.5)
    h = model.up(words) + F.linear(low, rewrite.operands["mine.b"])
    wanted = model.conv(model.down(h).transpose(1, 2)) + h.mean()
    assert_close(graph_module(IDS), wanted)


def twice(kind: Any, base: Any, x: Tensor) -> Tensor:
    return base(base(x))


def never(kind: Any, base: Any, x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(("function", "calls"), [(twice, 2), (never, 0)])
def test_base_is_called_once(function: Any, calls: int) -> None:
    graph_module = matched(FORMS["aten"]())
    with pytest.raises(PassError, match=rf"site 'up': .*exactly once, it did {calls} times"):
        InjectPass({"up": [Rewrite("bad", function)]})(graph_module)


def test_an_operand_that_is_a_buffer_is_in_no_state_dict() -> None:
    graph_module = FORMS["aten"]()
    before = set(graph_module.state_dict())
    inject(graph_module, "up")
    assert set(graph_module.state_dict()) - before == {"adapters.up.mine.a", "adapters.up.mine.b"}


def test_a_copy_is_as_good() -> None:
    graph_module = FORMS["call_module"]()
    rewrites = inject(graph_module, "up", "conv")
    twin = copy.deepcopy(graph_module)
    assert_close(twin(IDS), expected(rewrites))
    assert not InjectPass({k: [v] for k, v in rewrites.items()})(twin).modified


# --- redirect ---


@pytest.mark.parametrize("form", READ)
def test_redirect_reads_the_operand(form: str) -> None:
    graph_module = FORMS[form]()
    bias = nn.Parameter(torch.randn(10))
    result = RedirectPass({"up": {"bias": ("mine.bias", bias)}})(graph_module)
    graph_module.recompile()
    assert result.modified
    assert result.report.matched == ("up.bias",)
    model = program()
    model.up.bias = bias
    assert_close(graph_module(IDS), model(IDS))
    before = graph_text(graph_module)
    again = RedirectPass({"up": {"bias": ("mine.bias", bias)}})(graph_module)
    assert not again.modified
    assert graph_text(graph_module) == before


@pytest.mark.parametrize("form", READ)
def test_redirect_and_inject_together(form: str) -> None:
    graph_module = FORMS[form]()
    bias = nn.Parameter(torch.randn(10))
    Pipeline([RedirectPass({"up": {"bias": ("mine.bias", bias)}})])(graph_module)
    rewrites = inject(graph_module, "up", "down")
    shifted = expected(rewrites)
    model = program()
    a, b, c, d = (rewrites[s].operands[f"mine.{k}"] for s in ("up", "down") for k in "ab")
    words = model.words(IDS)
    h = F.linear(words, model.up.weight + 1.75 * b @ a, bias)
    y = F.linear(h, model.down.weight + 1.75 * d @ c, model.down.bias)
    wanted = model.conv(y.transpose(1, 2)) + h.mean()
    assert float((wanted - shifted).detach().abs().max()) > 0.05
    assert_close(graph_module(IDS), wanted)


def test_redirect_refuses_what_is_not_read() -> None:
    graph_module = FORMS["call_module"]()
    with pytest.raises(PassError, match=r"site 'up': the graph doesn't read 'bias' on its own"):
        RedirectPass({"up": {"bias": ("mine.bias", torch.zeros(10))}})(graph_module)


def test_redirect_without_redirects_changes_nothing() -> None:
    graph_module = FORMS["aten"]()
    assert not RedirectPass({})(graph_module).modified
    assert not RedirectPass({"up": {}})(graph_module).modified


def test_a_grouped_b_is_dense_in_rows() -> None:
    kind = Conv(4, 6, (3,), (1,), (1,), (1,), 2)
    h, b = torch.randn(2, 4, 5), torch.randn(kind.b_shape(4))
    assert_close(kind.expand_rows(h, kind.rows(b)), kind.expand(h, b))
    assert torch.equal(kind.unrows(kind.rows(b), 4), b)
