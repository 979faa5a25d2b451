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

from fxpeft.passes import CleanPass, FoldInactivePass, GroupPass, Pipeline
from fxpeft.passes.backend.group import Group
from fxpeft.passes.slots.slot import slot
from fxpeft.passes.targets.operations import Linear

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
    gm = fx.symbolic_trace(function)
    mode = FakeTensorMode()
    FakeTensorProp(gm, mode).propagate(*values().values())
    return gm


SLOTS = {name for name in SHAPES if name[0] in "abd"}


def test_group(graph_snapshot: Any) -> None:
    gm, given = traced(two), values()
    wanted = gm(*given.values())
    group = GroupPass({"a1": None, "a2": None}, {"a1": "one", "a2": "two"})
    grouping = Pipeline([group, CleanPass(SLOTS)])
    graph_snapshot(gm)
    gm = grouping(gm)
    graph_snapshot(gm)
    assert group.groups == (Group("a1", ("a1", "a2")),)
    assert [r.matched for r in grouping.reports] == [("one", "two"), ("type_as_3",)]
    given["a1"] = torch.stack([given["a1"], given["a2"]], 1)
    for found, expected in zip(gm(*given.values()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    again = group(gm)
    assert not again.modified
    assert group.groups == ()


def test_fold_and_clean(graph_snapshot: Any) -> None:
    gm, given = traced(two), values()
    given["d1"].zero_()
    given["d2"].zero_()
    folding, cleaning = Pipeline([FoldInactivePass({"d1": 0, "d2": 0})]), Pipeline([CleanPass(SLOTS)])
    gm = folding(gm)
    graph_snapshot(gm)
    assert len(folding.reports[0].matched) == 6
    gm = cleaning(gm)
    graph_snapshot(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [F.linear] * 2
    x = given["x"]
    assert all(torch.equal(y, F.linear(x, given[w])) for y, w in zip(gm(*given.values()), ("w1", "w2"), strict=True))
    assert not CleanPass(SLOTS)(gm).modified


@pytest.mark.parametrize(
    ("function", "why", "reason"),
    [
        (two, "is trained", "is trained"),
        (written, None, "_foreach_mul_ may change their input between the sites that share it"),
        (apart, None, "shares its input with no other site"),
        (elsewhere, None, "every A of the group is read elsewhere too"),
    ],
    ids=["trained", "written", "apart", "elsewhere"],
)
def test_left_alone(function: Callable[..., Any], why: str | None, reason: str) -> None:
    gm = traced(function) if function is not written else _with_example(fx.symbolic_trace(function))
    before = gm.code
    result = GroupPass({"a1": why, "a2": why})(gm)
    assert not result.modified
    assert {(s.site, s.reason) for s in result.report.skipped} == {("a1", reason), ("a2", reason)}
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
    group = GroupPass({"a1": None, "a2": None})
    gm = Pipeline([group])(gm)
    assert group.groups == (Group("a2", ("a1", "a2")),)
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
    gm = fx.symbolic_trace(function)
    nodes = {node.name: node for node in gm.graph.nodes}
    with gm.graph.inserting_after(nodes["relu_"]):  # as Dynamo captures ``cache[0] = h``
        gm.graph.call_function(operator.setitem, (nodes["cache"], 0, nodes["linear"]))
    wanted = torch.ones(2, 3, 2)
    gm.recompile()
    gm(x, a, wanted)
    result = CleanPass({"a"})(gm)
    assert set(result.report.matched) == {"exp", "sin"}
    found = torch.ones(2, 3, 2)
    gm.recompile()
    gm(x, a, found)
    assert torch.equal(found, wanted)
