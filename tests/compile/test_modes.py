"""Symbolic batches, lengths and ranks together, stances, and nested compile regions: one graph for every swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_nets import MAX_RANK, Block, check_swaps, inputs, net, prepared
from closeness import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule

import fxpeft
from fxpeft.testing import count_graphs, no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
SIZES = ((2, 3), (3, 2), (5, 5), (MAX_RANK, MAX_RANK), (13, 2))  # as large as some adapter's rank, or as max_rank


def marked(x: Tensor) -> Tensor:
    """An input whose batch has a symbol of any size, and its length one of a range."""
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
    return x


def is_one_graph(compiled: Any, model: nn.Module, first: Tensor, *later: Tensor) -> None:
    """Every swap at every size after the first call."""
    with count_graphs() as counted, torch.no_grad():
        compiled(first)
        with no_recompiles(warm=True):
            for x in later:
                check_swaps(model, compiled, x)
    assert counted.graphs == 1


DYNAMIC: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "dynamic=True": ({"dynamic": True}, lambda: inputs(5, MAX_RANK)),
    "mark_dynamic": ({}, lambda: marked(inputs(5, MAX_RANK))),
}


@pytest.mark.parametrize(
    ("way", "rank"), [("dynamic=True", "dynamic"), ("dynamic=True", "static"), ("mark_dynamic", "dynamic")]
)
def test_batch_length_and_rank_are_symbols_of_their_own(way: str, rank: str) -> None:
    """The first call's batch is the rank in use, its length ``max_rank``."""
    options, first = DYNAMIC[way]
    model = prepared(rank=rank)
    fxpeft.set_adapter(model, "five")
    is_one_graph(torch.compile(model, fullgraph=True, **options), model, first(), *(inputs(*size) for size in SIZES))


def test_what_is_marked_static_stays_static() -> None:
    model = prepared()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    first, another = inputs(5, 6), inputs(2, 7)
    for x in (first, another):
        torch._dynamo.mark_static(x, 1)
    is_one_graph(compiled, model, first, inputs(2, 6))
    with torch.no_grad(), count_graphs() as counted:
        compiled(another)
    assert counted.graphs == 1  # another length is another graph, as in a bare model


def test_static_shapes_and_a_symbolic_rank() -> None:
    """``dynamic=False`` is about inputs: the rank in use is symbolic still."""
    model, graphs = prepared(), []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad(), no_recompiles():
        check_swaps(model, compiled, inputs())
    assert len(graphs) == 1
    values = [n.meta.get("example_value") for n in graphs[0].graph.nodes if n.op == "placeholder"]
    assert [type(v) for v in values if not isinstance(v, Tensor)] == [torch.SymInt]


STANCES = ("force_eager", "fail_on_recompile", "eager_on_recompile", "default")


def test_stances_around_swaps() -> None:
    model, x, other = prepared(), inputs(), inputs(7, 3)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), count_graphs() as counted:
        with torch.compiler.set_stance("force_eager"):
            check_swaps(model, compiled, x)
        assert counted.graphs == 0
        check_swaps(model, compiled, x)
        for stance in STANCES:
            with torch.compiler.set_stance(stance):
                check_swaps(model, compiled, x)
                if stance == "fail_on_recompile":
                    with pytest.raises(RuntimeError, match="fail_on_recompile"):
                        compiled(other)
                elif stance != "default":
                    check_swaps(model, compiled, other)  # eager
                check_swaps(model, compiled, x)
        assert counted.graphs == 1


def test_eager_then_compile_takes_its_sizes_from_two_calls() -> None:
    model = prepared()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch.compiler.set_stance("eager_then_compile"), count_graphs() as counted:
        compiled(inputs(3, 4))
        compiled(inputs(5, 4))
        graphs = counted.graphs
        for batch in (5, 9):
            check_swaps(model, compiled, inputs(batch, 4))
        assert counted.graphs == graphs


class Region(Block):
    """A block whose forward is a region of its own."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("compiler", ["torch", "fxpeft"])
def test_a_region_is_traced_once_and_swaps_in_each_block(compiler: str) -> None:
    """The blocks' slots hold different values, and some are off while others are on."""
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    model = prepared(Region)
    if compiler == "torch":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = fxpeft.compile(model, inner=backend, fullgraph=True)
    with no_recompiles() as counted, torch.no_grad():
        check_swaps(model, compiled, inputs())
    assert counted.graphs == 1
    for graph in graphs:
        calls = [n for n in graph.graph.nodes if "invoke_subgraph" in str(n.target)]
        assert len(calls) == 2
        assert len({n.args[0].target for n in calls}) == 1  # one body for both


def test_regions_in_training() -> None:
    def gradients(call: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        call(inputs()).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    found = []
    for compiled in (False, True):
        model = net(Region)
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "out"]))
        generator = torch.Generator().manual_seed(4)
        for value in fxpeft.adapter_state_dict(model).values():
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        found.append(gradients(torch.compile(model, fullgraph=True) if compiled else model, model))
    assert len(found[0]) == len(found[1]) == 8
    for wanted, grad in zip(*found, strict=True):
        assert float(wanted.abs().max()) > 0
        assert_close(grad, wanted)
