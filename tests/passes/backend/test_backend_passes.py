"""The backend's passes on a graph made by hand: golden graphs, numbers, and what each leaves alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxpeft.passes import BackendPass, CleanPass, Context, FoldInactivePass, GroupPass, Pipeline, SlotTensor
from fxpeft.passes.backend.group import Group, groups_of
from fxpeft.passes.backend.step import Step
from fxpeft.passes.slots.slot import slot
from fxpeft.passes.targets.operations import Linear
from fxpeft.passes.targets.update import update, update_rows

RANK = 3
SHAPES = {
    "x": (2, 6), "w1": (5, 6), "a1": (RANK, 6), "b1": (RANK, 5), "d1": (RANK,),
    "w2": (4, 6), "a2": (RANK, 6), "b2": (RANK, 4), "d2": (RANK,),
}  # fmt: skip


def site(x: Tensor, w: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return slot(Linear(6, 5), lambda t: F.linear(t, w), x, a=a, b=b, d=d)


def two(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    """Two sites with one input."""
    return site(x, w1, a1, b1, d1), site(x, w2, a2, b2, d2)


def written(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    first = site(x, w1, a1, b1, d1)
    torch._foreach_mul_([x], 2)
    return first, site(x, w2, a2, b2, d2)


def apart(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    return site(x, w1, a1, b1, d1), site(x * 2, w2, a2, b2, d2)


def elsewhere(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    return site(x, w1, a1, b1, d1), site(x, w2, a2, b2, d2), a1.sum() + a2.sum()


def partly(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    return site(x, w1, a1, b1, d1), site(x, w2, a2, b2, d2), a1.sum()


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def traced(function: Callable[..., Any]) -> GraphModule:
    gm = opened(fx.symbolic_trace(function))
    mode = FakeTensorMode()
    FakeTensorProp(gm, mode).propagate(*values().values())
    return gm


def opened(gm: GraphModule) -> GraphModule:
    """As Dynamo captures it, which looks into functions that torch.fx makes one node of."""
    return _Opener(gm).transform()


class _Opener(fx.Transformer):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is update:
            return update_rows.__wrapped__(*args)  # type: ignore[attr-defined]
        return super().call_function(target, args, kwargs)


SITES = {"1": "one", "2": "two"}


def context(known: dict[str, int] | None = None, *, trained: bool = False) -> Context:
    """What the backend says of these graphs: ``a1``, ``b1`` and ``d1`` belong to the slot of site ``one``."""
    slots = {n: SlotTensor(n[0], SITES[n[1]], torch.empty(s)) for n, s in SHAPES.items() if n[0] in "abd"}
    for held in slots.values():
        held.tensor.requires_grad_(trained)
    return Context(slots, known or {})


def ran(backend_pass: BackendPass, gm: GraphModule, known: dict[str, int] | None = None) -> Pipeline:
    """The pipeline that ran one pass over a graph as the backend does."""
    pipeline = Pipeline([Step(backend_pass, context(known))])
    assert pipeline(gm) is gm
    return pipeline


def test_group(graph_snapshot: Any) -> None:
    gm, given = traced(two), values()
    wanted = gm(*given.values())
    grouping = Pipeline([Step(GroupPass(), context()), Step(CleanPass(), context())])
    graph_snapshot(gm)
    gm = grouping(gm)
    graph_snapshot(gm)
    assert groups_of(gm) == (Group("a1", ("a1", "a2")),)
    assert [r.matched for r in grouping.reports] == [("one", "two"), ("type_as_3",)]
    given["a1"] = torch.stack([given["a1"], given["a2"]], 1)
    for found, expected in zip(gm(*given.values()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    again = GroupPass()(gm, context=context())
    assert not again.modified
    assert again.graph_module is gm


def test_fold_and_clean(graph_snapshot: Any) -> None:
    gm, given = traced(two), values()
    given["d1"].zero_()
    given["d2"].zero_()
    folding = ran(FoldInactivePass(), gm, {"d1": 0, "d2": 0})
    graph_snapshot(gm)
    assert len(folding.reports[0].matched) == 6
    ran(CleanPass(), gm)
    graph_snapshot(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [F.linear] * 2
    x = given["x"]
    assert all(torch.equal(y, F.linear(x, given[w])) for y, w in zip(gm(*given.values()), ("w1", "w2"), strict=True))
    assert not CleanPass()(gm, context=context()).modified


@pytest.mark.parametrize(
    ("function", "trained", "reason"),
    [
        (two, True, "its A is trained"),
        (written, False, "_foreach_mul_ may change their input between the sites that share it"),
        (apart, False, "shares its input with no other site"),
        (elsewhere, False, "every A of the group is read elsewhere too"),
    ],
    ids=["trained", "written", "apart", "elsewhere"],
)
def test_left_alone(function: Callable[..., Any], trained: bool, reason: str) -> None:
    gm = traced(function) if function is not written else _with_example(opened(fx.symbolic_trace(function)))
    before = gm.code
    result = GroupPass()(gm, context=context(trained=trained))
    assert not result.modified
    assert result.graph_module is gm
    assert {(s.site, s.reason) for s in result.report.skipped} == {("one", reason), ("two", reason)}
    result.graph_module.recompile()
    assert gm.code == before


def _with_example(gm: GraphModule) -> GraphModule:
    with FakeTensorMode():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(SHAPES[node.name])
    return gm


def test_the_stack_comes_in_the_place_of_an_a_that_nobody_else_reads() -> None:
    gm, given = traced(partly), values()
    wanted = gm(*given.values())
    ran(GroupPass(), gm)
    assert groups_of(gm) == (Group("a2", ("a1", "a2")),)
    given["a2"] = torch.stack([given["a1"], given["a2"]], 1)
    for found, expected in zip(gm(*given.values()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_clean_keeps_what_writes() -> None:
    """Behind the first site everything depends on a slot: what is put into a cache, for instance."""

    def function(x: Tensor, a: Tensor, cache: Tensor) -> Tensor:
        h = F.linear(x, a)
        cache.mul_(2)
        torch.relu_(h)
        torch.ops.aten.add_.Tensor(cache, h)
        torch.add(h, h, out=cache[1])
        h.exp()
        torch.sin(h)
        return x

    x, a = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    gm = opened(fx.symbolic_trace(function))
    nodes = {node.name: node for node in gm.graph.nodes}
    with gm.graph.inserting_after(nodes["relu_"]):  # as Dynamo captures ``cache[0] = h``
        gm.graph.call_function(operator.setitem, (nodes["cache"], 0, nodes["linear"]))
    wanted = torch.ones(2, 3, 2)
    gm.recompile()
    gm(x, a, wanted)
    result = CleanPass()(gm, context=Context({"a": SlotTensor("a", "one", a)}))
    assert set(result.report.matched) == {"exp", "sin"}
    found = torch.ones(2, 3, 2)
    gm.recompile()
    gm(x, a, found)
    assert torch.equal(found, wanted)


# --- the five questions to every pass: rewritten and numerics above, and ---


def plain(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    """No slot's tensor is read."""
    return F.linear(x, w1), torch.relu(F.linear(x, w2))


@pytest.mark.parametrize("made", [FoldInactivePass, GroupPass, CleanPass])
def test_unchanged(made: type[BackendPass]) -> None:
    gm = traced(plain)
    before, nodes = gm.code, list(gm.graph.nodes)
    result = made()(gm, context=context({"d1": 0, "d2": 0}))
    assert result.graph_module is gm
    assert not result.modified
    assert not result.report.matched
    gm.recompile()
    assert gm.code == before
    assert list(gm.graph.nodes) == nodes


def shared(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    """The input, and a site's output, have users besides."""
    h = torch.tanh(x)
    first, second = site(h, w1, a1, b1, d1), site(h, w2, a2, b2, d2)
    return first * 2, first.sum() + h.mean(), second, torch.relu(second)


def chain(x: Any, w1: Any, a1: Any, b1: Any, d1: Any, w2: Any, a2: Any, b2: Any, d2: Any) -> Any:
    """The second site reads what the first gives."""
    h = site(x, w1, a1, b1, d1)
    return site(F.pad(h, (0, 1)), w2, a2, b2, d2)


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("idle", [("1",), ("1", "2")], ids=["one", "both"])
@pytest.mark.parametrize("function", [shared, chain])
def test_fold_several_users_and_a_chain(function: Callable[..., Any], idle: tuple[str, ...]) -> None:
    gm, given = traced(function), values()
    known = {f"d{number}": 0 for number in idle}
    for name in known:
        given[name].zero_()
    wanted = outputs(gm(*given.values()))
    (report,) = ran(FoldInactivePass(), gm, known).reports
    assert report.matched
    ran(CleanPass(), gm)
    for found, expected in zip(outputs(gm(*given.values())), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    unread = {n.name for n in gm.graph.nodes if n.op == "placeholder" and not n.users}
    assert unread == {f"{part}{number}" for number in idle for part in "abd"}  # another slot's arithmetic is there
    assert not FoldInactivePass()(gm, context=context(known)).modified


def test_group_several_users() -> None:
    gm, given = traced(shared), values()
    wanted = gm(*given.values())
    (report,) = ran(GroupPass(), gm).reports
    assert report.matched == ("one", "two")
    given["a1"] = torch.stack([given["a1"], given["a2"]], 1)
    for found, expected in zip(gm(*given.values()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_group_leaves_a_chain() -> None:
    gm = traced(chain)
    result = GroupPass()(gm, context=context())
    assert not result.modified
    assert {s.reason for s in result.report.skipped} == {"shares its input with no other site"}


def test_clean_several_users_and_a_chain() -> None:
    def function(x: Tensor, a: Tensor, kept: Tensor) -> Tensor:
        h = F.linear(x, a)
        h.exp().sum() + h.sin().cos()
        return h.relu() * kept

    x, a, kept = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    gm = opened(fx.symbolic_trace(function))
    wanted = gm(x, a, kept)
    result = CleanPass()(gm, context=Context({"a": SlotTensor("a", "one", a)}))
    assert set(result.report.matched) == {"exp", "sum_1", "sin", "cos", "add"}
    assert result.graph_module is gm
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(x, a, kept), wanted)
