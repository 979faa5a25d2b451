"""Names in graphs, programs and modules: nothing of them becomes code, whatever captured them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import fxpeft
from fxpeft.errors import AdapterError
from fxpeft.passes import MatchPass, PassError, Pipeline
from fxpeft.passes.container import Container
from fxpeft.passes.live import feed_module, kind_of, replace_module, rewrite_module, trace_module
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.source import check_names, check_path, graph_source

CODE = 'a"+chr(98)+"'
HOSTILE = [CODE, "a\\", 'x")', "a\nimport os", "a\u2028b", "a\0"]
CONFIG = fxpeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every character that code asks for."""
    seen: list[int] = []
    real = builtins.chr
    monkeypatch.setattr(builtins, "chr", lambda n: (seen.append(n), real(n))[1])
    return seen


def reading(target: str, op: str = "get_attr") -> Graph:
    """A graph that reads or calls one attribute."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node(op, target, (x,) if op != "get_attr" else ()))
    return graph


@pytest.mark.parametrize("name", [*HOSTILE, "a b", "a;b", "class", "a.None", "a..b", "", "x'"])
@pytest.mark.parametrize("op", ["get_attr", "call_module"])
def test_source_reads_plain_names_only(op: str, name: str) -> None:
    with pytest.raises(PassError, match="expected"):
        graph_source(reading(name, op))


@pytest.mark.parametrize("name", ["0", "layers.0.weight", "my-layer.a_1", "größe"])
def test_plain_names_stay(name: str) -> None:
    source = graph_source(reading(name))
    compile(source, "generated", "exec")
    if name == "0":
        assert 'getattr(self, "0")' in source


def hostile_graphs() -> dict[str, Graph]:
    """A graph for every place where torch.fx writes a text as it is."""
    found = {f"{op} {name!r}": reading(name, op) for op in ("get_attr", "call_module") for name in HOSTILE}
    found["method"] = reading(CODE, "call_method")
    found["argument"] = Graph()
    found["argument"].output(found["argument"].placeholder("x"))
    next(iter(found["argument"].nodes)).target = "x=chr(98)"
    found["node"] = Graph()
    found["node"].output(found["node"].placeholder("x"))
    next(iter(found["node"].nodes)).name = "x;chr(98)"
    found["keyword"] = Graph()
    node = found["keyword"].call_function(torch.add, (1, 2), {"out=chr(98), alpha": 1})
    found["keyword"].output(node)
    return found


@pytest.mark.parametrize("name", hostile_graphs())
def test_no_pass_runs_on_a_graph_whose_names_are_code(name: str, telling: list[int]) -> None:
    graph = hostile_graphs()[name]
    with pytest.raises(PassError, match="expected"):
        check_names(graph)
    made = GraphModule.__new__(GraphModule)
    nn.Module.__init__(made)
    vars(made)["_graph"] = graph
    with pytest.raises(PassError, match="expected"):
        Pipeline([MatchPass(lambda site: True)])(made)
    assert 98 not in telling


class Keyed(nn.Module):
    """Its linear has the name that it is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.held = nn.ModuleDict()
        self.held._modules[name] = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The one linear."""
        return next(iter(self.held._modules.values()))(x)


def test_names_of_nested_arguments_are_checked() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(5, 7)), (torch.ones(2, 5),)).module()
    info = program.graph._codegen.pytree_info
    program.graph._codegen.pytree_info = info._replace(orig_args=[*info.orig_args[:-1], "x=chr(98)"])
    with pytest.raises(PassError, match="expected an identifier"):
        check_names(program.graph)
    with pytest.raises(AdapterError, match="can't be rewritten"):
        fxpeft.rewrite(program, CONFIG)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_live_model_may_have_any_names(name: str, telling: list[int]) -> None:
    model, x = Keyed(name), torch.randn(2, 5)
    bare = model(x)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules="kind:linear", init_lora_weights=False))
    assert not torch.allclose(model(x), bare)
    fxpeft.prepare_hotswap(model, 4)
    assert not torch.allclose(model(x), bare)
    fxpeft.remove(model)
    assert torch.equal(model(x), bare)
    assert 98 not in telling


@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_with_such_names_is_refused(name: str, tmp_path: Path, telling: list[int]) -> None:
    model = Keyed(name).eval()
    with pytest.raises(AdapterError, match="can't be captured"):
        fxpeft.package(model, tmp_path / "model.pt2", (torch.ones(2, 5),), targets="kind:linear")
    with pytest.raises(AdapterError, match="can't be captured"):
        fxpeft.roles(model, {"x": torch.ones(2, 5)})
    program = torch.export.export(nn.Sequential(nn.Linear(5, 7)), (torch.ones(2, 5),))
    for spec in program.graph_signature.input_specs:
        if spec.target == "0.weight":
            spec.target = f"{name}.weight"
    with pytest.raises(AdapterError, match="can't be rewritten"):
        fxpeft.rewrite(program, CONFIG)
    for graph in hostile_graphs().values():
        made = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(5, 7)))
        made._graph = graph
        with pytest.raises(AdapterError, match="can't be rewritten"):
            fxpeft.rewrite(made, CONFIG)
        with pytest.raises(AdapterError, match="can't be rewritten"):
            fxpeft.eject(made)
    assert 98 not in telling


@pytest.mark.parametrize("name", ["a b", "en/de", "l:1", "x'"])
def test_odd_names_that_are_harmless_stay(name: str) -> None:
    model, x = Keyed(name).eval(), torch.randn(2, 5)
    bare = model(x)
    check_path(f"held.{name}.weight")
    program = torch.export.export(model, (x,))
    rewritten = fxpeft.rewrite(program, fxpeft.LoraConfig(r=2, target_modules="kind:linear", init_lora_weights=False))
    torch.testing.assert_close(fxpeft.eject(rewritten).module()(x), bare)


def test_operands_and_feeds_are_checked_too(telling: list[int]) -> None:
    module = nn.Linear(3, 4)
    rewrite = Rewrite("odd", lambda kind, base, x, **own: base(x), {f"{CODE}.a": torch.ones(1)})
    reads = Rewrite("odd", lambda kind, base, x, **own: base(x) + next(iter(own.values())), {CODE: torch.ones(1)})
    for each in (rewrite, reads):
        with pytest.raises(PassError, match=r"site: .*expected"):
            rewrite_module(module, [each], name="site")
    with pytest.raises(PassError, match=r"site: .*expected"):
        rewrite_module(module, [], name="site", redirects={"bias": (CODE, torch.ones(4))})
    with pytest.raises(PassError, match="expected a plain dotted name"):
        replace_module(module, f"adapters.{CODE}")
    feed = Feed("odd", lambda inputs, **own: inputs, {}, {"embed": f"model.{CODE}"})
    with pytest.raises(PassError, match=r"site: .*expected"):
        feed_module(module, feed, name="site")
    assert type(module) is nn.Linear
    assert 98 not in telling


class WithChild(nn.Linear):
    """A linear that scales its output by what a child of an odd name holds."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.held = nn.ModuleDict()
        self.held._modules[CODE] = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through the child."""
        return self.held._modules[CODE](super().forward(x)) * 2


def test_a_module_that_calls_a_child_of_such_a_name_is_called_whole(telling: list[int]) -> None:
    model, x = nn.Sequential(WithChild()), torch.randn(2, 3)
    bare = model(x)
    assert any(n.op == "call_module" and n.target == "base_forward" for n in trace_module(model[0]).graph.nodes)
    fxpeft.add_adapter(model, CONFIG)
    part = model[0].adapters.default
    update = part.scaling * x @ part.lora_A.t() @ part.lora_B.t()
    torch.testing.assert_close(model(x), bare + update)
    assert 98 not in telling


# --- what modules share, and what not ---


class Table(nn.Linear):
    """Attributes of many kinds, one of them read by the forward."""

    factor: Any = 2

    def __init__(self, **values: Any) -> None:
        super().__init__(3, 4)
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled."""
        return super().forward(x) * self.factor


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int": ({"factor": 2}, {"factor": 3}),
    "int and float": ({"factor": 1}, {"factor": 1.5}),
    "sign of zero": ({"factor": 0.0}, {"factor": -0.0}),
    "unhashable": ({"other": [[1], {2: 3}], "factor": 2}, {"other": [[1], {2: 3}], "factor": 3}),
    "nested lists": ({"other": ([1, [2]],), "factor": 2}, {"other": ([1, [2]],), "factor": 3}),
    "tuples of tensors": ({"other": (torch.ones(2),), "factor": 2}, {"other": (torch.ones(2),), "factor": 3}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_modules_that_differ_share_nothing(pair: str) -> None:
    x = torch.randn(2, 3)
    for values in (*PAIRS[pair], *PAIRS[pair]):
        model = nn.Sequential(Table(**values))
        bare = model(x)
        fxpeft.add_adapter(model, CONFIG)
        part = model[0].adapters.default
        update = part.scaling * x @ part.lora_A.t() @ part.lora_B.t() * values["factor"]
        torch.testing.assert_close(model(x), bare + update)


def test_class_attributes_children_and_closures_count() -> None:
    x = torch.randn(2, 3)

    class Gate(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y * self.factor

    class Gated(nn.Linear):
        shared = 1.0

        def __init__(self, factor: float) -> None:
            super().__init__(3, 4)
            self.gate = Gate(factor)

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return self.gate(super().forward(y)) * self.shared * outer

    def scale(factor: float) -> float:
        model = nn.Sequential(Gated(factor))
        bare = model(x)
        fxpeft.add_adapter(model, CONFIG)
        part = model[0].adapters.default
        return float(((model(x) - bare) / (part.scaling * x @ part.lora_A.t() @ part.lora_B.t())).mean())

    outer = 1.0
    assert scale(2.0) == pytest.approx(2, rel=1e-2)
    assert scale(3.0) == pytest.approx(3, rel=1e-2), "a child's attribute"
    Gated.shared = 5.0
    assert scale(3.0) == pytest.approx(15, rel=1e-2), "a class's attribute"
    outer = 2.0
    assert scale(3.0) == pytest.approx(30, rel=1e-2), "a closed-over value"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_are_read_not_written_into_the_code(dtype: torch.dtype) -> None:
    class Buffered(nn.Linear):
        def __init__(self, value: float) -> None:
            super().__init__(3, 4)
            self.register_buffer("level", torch.tensor(value, dtype=dtype))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return (super().forward(y) * (self.level * 2)).to(self.level.dtype)

    x = torch.randn(2, 3)
    for value in (1.0, 4.0):
        model = nn.Sequential(Buffered(value))
        bare = model(x)
        fxpeft.add_adapter(model, CONFIG)
        part = model[0].adapters.default
        update = part.scaling * x @ part.lora_A.t() @ part.lora_B.t() * value * 2
        torch.testing.assert_close(model(x), bare + update.to(dtype))
        model[0].level.fill_(0)
        assert not model(x).any()


def test_a_kind_is_not_remembered_for_another_size() -> None:
    assert kind_of(nn.Linear(3, 4)) == kind_of(nn.Linear(3, 4))
    assert kind_of(nn.Linear(3, 4)) != kind_of(nn.Linear(4, 3))
    assert isinstance(Container(), nn.Module)
