"""Graphs that Dynamo captured: parameters known by their source, operands that AOTAutograd finds in its own table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from graphs import IDS, SITES, Functional, Program, chains, program
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxpeft.passes import EjectPass, InjectPass, MatchPass, Pipeline
from fxpeft.passes.captured.dynamo import annotate_sources, name_operands, parameter_path, source_name
from fxpeft.passes.meta import OPERAND, READS, TARGET
from fxpeft.passes.targets.reading import read_path


def captured(
    module: nn.Module, *args: Any, look: Callable[[GraphModule], Any] = annotate_sources, grad: bool = False
) -> tuple[GraphModule, list[Any], Any]:
    """The graph that Dynamo hands to a backend, the inputs that it is called with, and what a look at it there gave.

    After the backend has returned Dynamo forgets the sources.
    """
    found: list[tuple[GraphModule, list[Any], Any]] = []

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph_module, inputs, look(graph_module)))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(module, backend=backend, fullgraph=True)(*args)
    return found[0]


CLASSES = pytest.mark.parametrize("cls", [Program, Functional])


@CLASSES
def test_every_parameter_is_known(cls: type[Program]) -> None:
    """Whether the graph reads it from a module or takes it as an input; what it is called there is no contract."""
    sources: dict[str, Any] = {}

    def look(graph_module: GraphModule) -> Any:
        sources.update({n.name: source_name(n) for n in graph_module.graph.nodes if n.op == "placeholder"})
        return annotate_sources(graph_module)

    graph_module, _, examples = captured(program(cls), IDS, look=look)
    own = dict(program(cls).named_parameters())
    assert set(examples) == set(own)
    assert all(torch.equal(examples[name], own[name]) for name in own)
    carried = {READS.of(n) for n in graph_module.graph.nodes if READS.has(n)}
    assert carried == set(own)
    assert {read_path(n) for n in graph_module.graph.nodes} - {None} == set(own)
    (ids,) = [n for n in graph_module.graph.nodes if n.op == "placeholder" and not READS.has(n)]
    assert sources[ids.name] == "L['ids']"
    assert parameter_path(sources[ids.name]) is None  # an input that is no parameter stays one


@CLASSES
def test_matched_rewritten_and_ejected(cls: type[Program]) -> None:
    """A chain of sites, one with a second user, on what only the sources name."""
    graph_module, inputs, _ = captured(program(cls), IDS)
    bare, before = graph_module(*inputs), str(graph_module.graph)
    Pipeline([MatchPass(lambda site: site in SITES)])(graph_module)
    assert {TARGET.of(n).site for n in graph_module.graph.nodes if TARGET.has(n)} == set(SITES)
    Pipeline([InjectPass(chains(graph_module, *SITES))])(graph_module)
    other = torch.fx.symbolic_trace(program(cls))
    Pipeline([MatchPass(lambda site: site in SITES)])(other)
    Pipeline([InjectPass(chains(other, *SITES))])(other)
    assert_close(graph_module(*inputs)[0], other(IDS))
    assert not torch.allclose(graph_module(*inputs)[0], bare[0], atol=0.01)
    Pipeline([EjectPass()])(graph_module)
    assert str(graph_module.graph) == before
    assert torch.equal(graph_module(*inputs)[0], bare[0])


def test_a_second_look_changes_nothing() -> None:
    texts: list[str] = []

    def look(graph_module: GraphModule) -> Any:
        texts.append(str(graph_module.graph))
        twice = annotate_sources(graph_module), annotate_sources(graph_module)
        texts.append(str(graph_module.graph))
        return twice

    _, _, (first, again) = captured(program(), IDS, look=look)
    assert again.keys() == first.keys()
    assert all(again[name] is first[name] for name in again)
    assert texts[0] == texts[1]


def test_tied_parameters_have_the_name_of_the_first() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    module = Tied()
    _, _, examples = captured(module, torch.randn(2, 5))
    assert set(examples) - {"second.weight"} == {"first.weight", "first.bias", "second.bias"}
    assert examples["first.weight"] is module.first.weight or torch.equal(examples["first.weight"], module.first.weight)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['up']._parameters['weight']", "up.weight"),
        ("L['self']._modules['a']._modules['0']._buffers['mean']", "a.0.mean"),
        ("L['self']._parameters['scale']", "scale"),
        ("L['fn']._modules['x-y']._parameters['weight']", "x-y.weight"),
        ("L['x']", None),
        ("L['self']._modules['up']", None),
        ("L['self'].up", None),
        ("G['weights']['_parameters']", None),
        ("L['self']._parameters['weight'].grad", None),
    ],
)
def test_the_name_in_a_source(source: str, path: str | None) -> None:
    assert parameter_path(source) == path


def test_a_node_without_a_source() -> None:
    graph = Graph()
    assert source_name(graph.placeholder("x")) is None


def test_mangled_attributes_of_an_older_export() -> None:
    """``torch._dynamo.export`` reads ``L__self___up_weight``; the stack of modules says whose it is."""
    root = nn.Module()
    root.register_parameter("L__self___block_0_up_weight", nn.Parameter(torch.ones(3, 2)))
    root.register_parameter("L__self___other", nn.Parameter(torch.ones(2)))
    graph = Graph()
    x = graph.placeholder("x")
    weight, other = (graph.get_attr(n) for n in ("L__self___block_0_up_weight", "L__self___other"))
    product = graph.call_function(nn.functional.linear, (x, weight))
    stack = {"L__self___block_0_up": ("L['self'].block.0.up", nn.Linear)}
    for node in (weight, product):
        node.meta["nn_module_stack"] = stack
    graph.output((product, other))
    graph_module = GraphModule(root, graph)
    examples = annotate_sources(graph_module)
    assert list(examples) == ["block.0.up.weight"]
    assert examples["block.0.up.weight"] is graph_module.L__self___block_0_up_weight
    assert READS.of(weight) == "block.0.up.weight"
    assert not READS.has(other)


@pytest.mark.parametrize("grad", [False, True])
def test_operands_have_sources_that_aot_autograd_asks_for(grad: bool) -> None:
    graph_module, _, _ = captured(program(), IDS, grad=grad)
    Pipeline([MatchPass(lambda site: site in SITES)])(graph_module)
    Pipeline([InjectPass(chains(graph_module, "up", "down"))])(graph_module)
    graph_module._param_name_to_source = dict(getattr(graph_module, "_param_name_to_source", None) or {})
    known = dict(graph_module._param_name_to_source)
    name_operands(graph_module)
    added = graph_module._param_name_to_source.keys() - known.keys()
    operands = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr" and OPERAND.has(n)}
    assert added == operands - known.keys()
    assert len(operands) == 12  # two LoRAs at each of the two sites
    names = [source.name() if callable(source.name) else source.name for source in
             (graph_module._param_name_to_source[path] for path in operands)]  # fmt: skip
    assert len(set(names)) == len(names)
    name_operands(graph_module)  # a second time: nothing new
    assert graph_module._param_name_to_source.keys() == known.keys() | added


def test_a_graph_without_that_table_is_left_alone() -> None:
    graph_module = torch.fx.symbolic_trace(program())
    before = set(vars(graph_module))
    name_operands(graph_module)
    assert set(vars(graph_module)) == before
