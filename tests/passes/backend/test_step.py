"""One backend pass on one graph: a pass of one's own enters by the same door, and what is wrong with it names it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from fxpeft.passes import BackendPass, Context, PassError, Pipeline, Report, RewriteResult
from fxpeft.passes.backend.registry import BUILT_IN, NAMES, chosen
from fxpeft.passes.backend.step import Step


def program(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(F.linear(x, w))
    return h, h.sum(0)


def captured() -> GraphModule:
    """The program with the values that Dynamo gives nodes."""
    gm = fx.symbolic_trace(program)
    mode = FakeTensorMode()
    values: dict[fx.Node, Any] = {}
    with mode:
        values = dict(zip(gm.graph.nodes, (torch.empty(3, 4), torch.empty(5, 4)), strict=False))
        for node in gm.graph.nodes:
            if node.op.startswith("call_"):
                args = fx.node.map_arg(node.args, values.__getitem__)
                run = getattr(args[0], node.target) if node.op == "call_method" else node.target
                values[node] = run(*args[node.op == "call_method" :])
            if node in values:
                node.meta["example_value"] = values[node]
    return gm


class Mine(BackendPass):
    """What the tests let it do."""

    name = "mine"

    def __init__(self, change: Callable[[GraphModule], Any], modified: bool = True) -> None:
        self.change, self.modified = change, modified

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        found = self.change(graph_module)
        if isinstance(found, RewriteResult | str):
            return found  # type: ignore[return-value]
        return RewriteResult(graph_module, self.modified, Report(self.name, ("here",)))


def run(backend_pass: BackendPass, gm: GraphModule) -> Pipeline:
    pipeline = Pipeline([Step(backend_pass, Context())])
    pipeline(gm)
    return pipeline


def named(gm: GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def to_relu(gm: GraphModule) -> None:
    """Tanh becomes relu and a product, made without values."""
    old = named(gm, "tanh")
    with gm.graph.inserting_before(old):
        doubled = gm.graph.call_method("mul", (gm.graph.call_function(torch.relu, old.args), 2))
    old.replace_all_uses_with(doubled)
    gm.graph.erase_node(old)


def test_what_it_does_is_linted_compiled_counted_and_has_values(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fxpeft.passes.pipeline")
    gm, x, w = captured(), torch.randn(3, 4), torch.randn(5, 4)
    (report,) = run(Mine(to_relu), gm).reports
    assert (report.name, report.matched, report.nodes_before, report.nodes_after) == ("mine", ("here",), 6, 7)
    for found, expected in zip(gm(x, w), (F.linear(x, w).relu() * 2, (F.linear(x, w).relu() * 2).sum(0)), strict=True):
        assert torch.equal(found, expected)
    assert [tuple(named(gm, n).meta["example_value"].shape) for n in ("relu", "mul")] == [(3, 5), (3, 5)]
    assert "nodes of mine: mul 0 -> 1, relu 0 -> 1, tanh 1 -> 0" in caplog.messages


def test_what_changes_nothing_leaves_the_very_graph() -> None:
    gm = captured()
    code = gm.code
    pipeline = Pipeline([Step(Mine(lambda gm: None, modified=False), Context())])
    assert pipeline(gm) is gm
    assert gm.code is code


def other(gm: GraphModule) -> RewriteResult:
    """Another graph module, of the same inputs and outputs."""
    return RewriteResult(fx.symbolic_trace(program), True, Report("mine"))


def test_another_graph_module_may_come_back() -> None:
    gm = captured()
    pipeline = Pipeline([Step(Mine(other), Context())])
    made = pipeline(gm)
    assert made is not gm
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(made(x, w)[0], torch.tanh(F.linear(x, w)))


def raises(gm: GraphModule) -> None:
    raise KeyError("no such node")


def drops_an_output(gm: GraphModule) -> None:
    output = named(gm, "output")
    output.args = (output.args[0][:1],)  # type: ignore[index]


def turns_an_output(gm: GraphModule) -> None:
    output, tanh = named(gm, "output"), named(gm, "tanh")
    with gm.graph.inserting_before(output):
        turned = gm.graph.call_method("t", (tanh,))
    output.replace_input_with(tanh, turned)


def halves_an_output(gm: GraphModule) -> None:
    output, tanh = named(gm, "output"), named(gm, "tanh")
    with gm.graph.inserting_before(output):
        half = gm.graph.call_method("half", (tanh,))
    output.replace_input_with(tanh, half)


def adds_an_input(gm: GraphModule) -> None:
    with gm.graph.inserting_before(named(gm, "linear")):
        gm.graph.placeholder("more")


def swaps_inputs(gm: GraphModule) -> None:
    named(gm, "w").append(named(gm, "x"))


def uses_before(gm: GraphModule) -> None:
    named(gm, "x").append(named(gm, "tanh"))


def misfit(gm: GraphModule) -> None:
    with gm.graph.inserting_after(named(gm, "tanh")):
        gm.graph.call_function(operator.matmul, (named(gm, "x"), named(gm, "x")))


WRONG: dict[str, tuple[Any, bool, str]] = {
    "raises": (raises, True, "pass mine: KeyError: 'no such node'"),
    "drops an output": (drops_an_output, True, "pass mine: what the graph returns: expected 2 values, found 1"),
    "turns an output": (
        turns_an_output,
        True,
        r"returns, number 0: expected float32 \[3, 5\] on cpu, found float32 \[5, 3\] on cpu",
    ),
    "halves an output": (halves_an_output, True, r"number 0: expected float32 \[3, 5\] .*, found float16"),
    "adds an input": (adds_an_input, True, "pass mine: what the graph takes: expected 2 values, found 3"),
    "swaps inputs": (swaps_inputs, True, "pass mine: what the graph takes, number 0: expected x, found w"),
    "uses before it computes": (uses_before, True, "pass mine left a graph that is not sound"),
    "shapes that don't fit": (misfit, True, "pass mine: its node .*matmul"),
    "says that nothing changed": (to_relu, False, "pass mine: changed the graph and says that it did not"),
    "gives another graph": (
        lambda gm: RewriteResult(fx.symbolic_trace(program), False, Report("mine")),
        False,
        "pass mine: changed the graph and says that it did not",
    ),
    "gives no result": (lambda gm: "done", True, "pass mine: expected a RewriteResult from it, found str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_names_the_pass(case: str) -> None:
    change, modified, message = WRONG[case]
    with pytest.raises(PassError, match=message):
        run(Mine(change, modified), captured())


# --- the registry ---


def test_order_is_the_registrys_and_ones_own_stand_where_they_are_put() -> None:
    assert NAMES == ("fold_inactive", "group", "clean")
    mine = Mine(raises)
    assert [each.name for each in chosen(("clean", mine, "fold_inactive"))] == ["fold_inactive", "mine", "clean"]
    assert [each.name for each in chosen((mine, "clean", "clean", "group"))] == ["mine", "group", "clean"]
    assert [each.name for each in chosen({"clean", "group"})] == ["group", "clean"]
    assert chosen((mine,)) == (mine,)
    assert chosen(()) == ()
    assert not set(map(id, chosen(NAMES))) & set(map(id, chosen(NAMES)))  # graphs of two threads share none
    assert all(isinstance(each(), BackendPass) and each.uuid == each.name for each in BUILT_IN)


class Odd(Mine):
    name = "not/a name"


class Named(Mine):
    name = "clean"


class Keyed(Mine):
    uuid = 7  # type: ignore[assignment]


class Nowhere(Mine):
    graphs = ("both",)


class Nameless(BackendPass):
    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            ("fold", "clean"),
            "expected some of fold_inactive, group, clean, found .'fold', 'clean'.; a pass of your own",
        ),
        ("clean", "expected some of fold_inactive, group, clean, found 'clean'"),
        ((Mine,), "found .*Mine.*is an object of a class below fxpeft.passes.BackendPass"),
        ((nn.ReLU(),), "found .ReLU"),
        ((Odd(raises),), "Odd.name: expected an identifier other than .*, found 'not/a name'"),
        ((Named(raises),), "Named.name: expected an identifier other than .*, found 'clean'"),
        ((Nameless(),), "Nameless.name: .* found None"),
        ((Keyed(raises),), "mine.uuid: expected text, bytes or None, found int"),
        ((Nowhere(raises),), "mine.graphs: expected some of idle, active, found .'both'"),
        ({Mine(raises)}, "expected a sequence, for yours run where they stand, found a set"),
    ],
    ids=[
        "unknown",
        "text",
        "a class",
        "no pass",
        "odd name",
        "a name that is taken",
        "no name",
        "uuid",
        "graphs",
        "set",
    ],
)
def test_what_is_no_pass_is_refused(passes: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        chosen(passes)
