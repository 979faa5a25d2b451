"""A backend pass of one's own through ``fxpeft.compile``: it takes part, swaps go on, and no code of before runs."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from tiny import randomise
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.passes import BackendPass, Context, Report, RewriteResult
from fxpeft.programs.backend import backend
from fxpeft.testing import no_recompiles

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_pass.py"
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.tanh(self.up(x)))
        return found


class Times(BackendPass):
    """Every tanh is multiplied by a factor: a number in the graph, or a buffer that the pass brings."""

    name = "times"

    def __init__(self, factor: float, uuid: str | None = None, *, as_buffer: bool = False) -> None:
        self.factor, self.uuid, self.as_buffer = factor, uuid, as_buffer
        self.seen: list[Context] = []

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        self.seen.append(context)
        graph, found = graph_module.graph, []
        if self.as_buffer:
            graph_module.register_buffer("factor", torch.tensor(self.factor))
        for node in [n for n in graph.nodes if n.target is torch.tanh]:
            with graph.inserting_after(node):
                times = graph.call_function(torch.mul, (node, self.factor))
            node.replace_all_uses_with(times, lambda user, times=times: user is not times)
            if self.as_buffer:
                with graph.inserting_before(times):
                    times.args = (node, graph.get_attr("factor"))
            found.append(node.name)
        return RewriteResult(graph_module, bool(found), Report(self.name, tuple(found)))


def prepared() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for seed, (name, rank) in enumerate((("a", 3), ("b", 5))):
        fxpeft.add_adapter(model, LoraConfig(r=rank, lora_alpha=7, target_modules=["up", "down"]), name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
    fxpeft.prepare_hotswap(model, 8, targets=["up", "down"])
    fxpeft.set_adapter(model, "a")
    return model


def wanted(model: Net, factor: float) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.down(torch.tanh(model.up(X)) * factor)
    return found


def called(compiled: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return compiled(X)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("as_buffer", [False, True])
def test_swaps_go_on_through_inductor(as_buffer: bool) -> None:
    model, mine = prepared(), Times(3.0, as_buffer=as_buffer)
    compiled = fxpeft.compile(model, passes=("fold_inactive", mine, "clean"), fullgraph=True)
    with no_recompiles() as counted:
        for name in ("a", "b", "off", "a"):
            fxpeft.disable_adapters(model) if name == "off" else fxpeft.enable_adapters(model)
            if name != "off":
                fxpeft.set_adapter(model, name)
            torch.testing.assert_close(called(compiled), wanted(model, 3.0), rtol=0, atol=1e-5)
    assert counted.graphs == 1
    idle, active = mine.seen
    assert {held.site for held in active.slots.values()} == {"up", "down"}
    assert {held.part for held in active.slots.values()} == {"a", "b", "d"}
    assert {active.slots[name].part for name in idle.values} == {"d"}
    assert set(idle.values.values()) == {0}
    assert active.values == {}


def test_a_buffer_of_a_pass_may_change_in_place() -> None:
    model, held = prepared(), list[GraphModule]()

    class Kept(Times):
        def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
            held.append(graph_module)
            return super().__call__(graph_module, context=context)

    compiled = fxpeft.compile(model, passes=(Kept(3.0, as_buffer=True),), fullgraph=True)
    with no_recompiles():
        torch.testing.assert_close(called(compiled), wanted(model, 3.0), rtol=0, atol=1e-5)
        held[0].factor.fill_(2)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(called(compiled), wanted(model, 2.0), rtol=0, atol=1e-5)


def test_it_runs_on_graphs_without_slots_too() -> None:
    model, mine = Net().eval(), Times(3.0)
    compiled = fxpeft.compile(model, passes=("fold_inactive", mine, "clean"), inner="eager")
    torch.testing.assert_close(called(compiled), wanted(model, 3.0), rtol=0, atol=1e-6)
    assert [context.slots for context in mine.seen] == [{}]


def test_through_torch_compile_by_the_same_door() -> None:
    model = prepared()
    options = {"passes": ("fold_inactive", Times(3.0)), "inner": "aot_eager"}
    compiled = torch.compile(model, backend=backend, options=options)
    torch.testing.assert_close(called(compiled), wanted(model, 3.0), rtol=0, atol=1e-5)


def test_it_sees_the_inner_backends_options() -> None:
    model, mine = prepared(), Times(3.0)
    called(
        fxpeft.compile(model, passes=(mine,), inner=lambda gm, inputs, **more: gm, options={"epilogue_fusion": True})
    )
    assert [context.options for context in mine.seen] == [{"epilogue_fusion": True}]


def test_errors_reach_the_user_with_the_passs_name() -> None:
    class Broken(Times):
        def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
            raise ZeroDivisionError("by design")

    with pytest.raises(Exception, match="pass times: ZeroDivisionError: by design"):
        called(fxpeft.compile(prepared(), passes=(Broken(1.0),), inner="eager"))
    with pytest.raises(AdapterError, match="passes: expected some of fold_inactive, group, clean, found"):
        fxpeft.compile(prepared(), passes=(Times,))  # type: ignore[arg-type]


# --- no code of before ---


@pytest.mark.parametrize("uuid", [None, "times"])
def test_a_pass_that_changed_is_another_one_in_the_same_process(uuid: str | None) -> None:
    """Dynamo runs what it compiled for a function by an equal backend with equal options."""
    model, mine = prepared(), Times(3.0, uuid and f"{uuid} 3")
    first = fxpeft.compile(model, passes=(mine,), inner="eager")
    torch.testing.assert_close(called(first), wanted(model, 3.0), rtol=0, atol=1e-5)
    mine.factor, mine.uuid = 2.0, uuid and f"{uuid} 2"
    second = fxpeft.compile(model, passes=(mine,), inner="eager")
    torch.testing.assert_close(called(second), wanted(model, 2.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(called(first), wanted(model, 3.0), rtol=0, atol=1e-5)
    if uuid is not None:  # the same pass again: nothing is compiled again
        with no_recompiles() as counted:
            called(fxpeft.compile(model, passes=(mine,), inner="eager"))
        assert counted.graphs == 0


def compiled_anew(mine: BackendPass | None) -> tuple[Tensor, dict[str, int]]:
    """As a process that comes later: the output, and what torch's cache on disk was asked."""
    torch._dynamo.reset()
    counters.clear()
    model = prepared()
    passes = ("fold_inactive", "clean") if mine is None else ("fold_inactive", mine, "clean")
    found = called(fxpeft.compile(model, passes=passes, fullgraph=True))
    prefix = "autograd_cache_"
    return found, {
        name.removeprefix(prefix): count for name, count in counters["aot_autograd"].items() if name.startswith(prefix)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("known_processor")
def test_caches_on_disk_know_the_pass() -> None:
    """The uuid is a part of the key also where the graphs are alike; without one nothing is kept."""
    with fresh_cache():
        model = prepared()
        assert compiled_anew(None)[1] == {"miss": 2, "saved": 2}  # the graph with slots and the one without
        for mine, factor, asked in (
            (Times(3.0, "one"), 3.0, {"miss": 2, "saved": 2}),
            (Times(3.0, "one"), 3.0, {"hit": 2}),
            (Times(2.0, "one"), 2.0, {"miss": 2, "saved": 2}),  # a uuid that lies: the number is in the graph
            (Times(3.0, "other"), 3.0, {"miss": 2, "saved": 2}),
            (Times(3.0), 3.0, {"bypass": 2}),
            (Times(3.0, "brings", as_buffer=True), 3.0, {"miss": 2, "saved": 2}),
            (Times(2.0, "brings", as_buffer=True), 2.0, {"hit": 2}),  # a buffer is an input of compiled code
            (None, 1.0, {"hit": 2}),
        ):
            found, counted = compiled_anew(mine)
            torch.testing.assert_close(found, wanted(model, factor), rtol=0, atol=1e-5)
            assert counted == asked, (mine and (mine.factor, mine.uuid), counted)


# --- the example ---


@pytest.mark.slow
def test_the_example() -> None:
    done = python(EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "three swaps and off: 1 graph compiled",
        "graph-01-active: 2 softmax before, 0 after",
        "graph-01-idle: 2 softmax before, 0 after",
    ]


def test_the_examples_pass_leaves_other_attention_alone() -> None:
    spec = importlib.util.spec_from_file_location("own_pass", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class Shown(nn.Module):
        """Its weights have a second reader."""

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            weights = torch.softmax(q @ k.transpose(-2, -1) / 2.0, dim=-1)
            return weights @ v, weights

    graph = torch.fx.symbolic_trace(Shown())
    before = copy.deepcopy(graph)
    result = example.FuseAttention()(graph, context=Context())
    assert not result.modified
    assert result.graph_module is graph
    assert [n.target for n in graph.graph.nodes] == [n.target for n in before.graph.nodes]
