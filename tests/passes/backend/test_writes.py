"""Which nodes may write: in place, by a word for the state, by an operator's schema; and which surely don't."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxpeft.passes.backend.writes import may_write

aten = torch.ops.aten


def node(make: Callable[[Graph, Node], Node]) -> Node:
    graph = Graph()
    return make(graph, graph.placeholder("x"))


def function(target: Any, *args: Any, **kwargs: Any) -> Callable[[Graph, Node], Node]:
    return lambda graph, x: graph.call_function(target, (x, *args), kwargs)


def method(name: str, *args: Any) -> Callable[[Graph, Node], Node]:
    return lambda graph, x: graph.call_method(name, (x, *args))


def cond(graph: Graph, x: Node) -> Node:
    return graph.call_function(torch.ops.higher_order.cond, (x, None, None, (x,)))


WRITES: dict[str, Callable[[Graph, Node], Node]] = {
    "x.add_(1)": method("add_", 1),
    "x.__setitem__": method("__setitem__", 0, 1),
    "x.__iadd__": method("__iadd__", 1),
    "x[0] = 1": function(operator.setitem, 0, 1),
    "x += 1": function(operator.iadd, 1),
    "x **= 2": function(operator.ipow, 2),
    "F.relu_": function(F.relu_),
    "relu(x, inplace=True)": function(F.relu, inplace=True),
    "relu(x, True)": function(F.relu, True),
    "torch.add(out=)": function(torch.add, 1, out=None),
    "aten.add_.Tensor": function(aten.add_.Tensor, 1),
    "aten.add.out": function(aten.add.out, 1, out=None),
    "aten.relu_": function(aten.relu_),
    "autocast begins": function(torch.amp.autocast_mode._enter_autocast),
    "autocast ends": function(torch.amp.autocast_mode._exit_autocast),
    "gradients off": function(torch._C._set_grad_enabled),
    "a higher-order operator": cond,
    "a module": lambda graph, x: graph.call_module("any", (x,)),
}
READS: dict[str, Callable[[Graph, Node], Node]] = {
    "x": lambda graph, x: x,
    "an attribute": lambda graph, x: graph.create_node("get_attr", "weight"),
    "x + 1": function(operator.add, 1),
    "x.add(1)": method("add", 1),
    "x.view": method("view", 2, 3),
    "x.__len__": method("__len__"),
    "F.linear": function(F.linear, None, None),
    "F.relu": function(F.relu),
    "relu(x, inplace=False)": function(F.relu, inplace=False),
    "aten.add.Tensor": function(aten.add.Tensor, 1),
    "aten.linear": function(aten.linear.default, None),
    "F.dropout": function(F.dropout, 0.1, False),
    "a tuple's item": function(operator.getitem, 0),
}


@pytest.mark.parametrize("case", WRITES)
def test_may_write(case: str) -> None:
    assert may_write(node(WRITES[case]))


@pytest.mark.parametrize("case", READS)
def test_does_not(case: str) -> None:
    assert not may_write(node(READS[case]))


def test_what_is_asked_of_a_traced_program() -> None:
    """Of a chain, exactly the nodes that write, whoever uses their results."""

    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.mul_(3)
        y[0] = x[0]
        return y.relu() + F.dropout(y, 0.1, False) + y.t().contiguous().sum_to_size(1, 1)

    graph = make_fx(program)(torch.randn(3, 3)).graph
    assert [n.name for n in graph.nodes if may_write(n)] == ["mul_", "copy_"]
    assert sum(n.op == "call_function" for n in graph.nodes) > 6
