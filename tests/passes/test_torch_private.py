"""Canaries: each private API of torch that fxpeft uses still does what it is used for."""

from __future__ import annotations

import copy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, StrictMinMaxConstraint
from torch.utils.checkpoint import checkpoint

from fxpeft.passes import torch_private
from fxpeft.passes.rewrite.subgraphs import copy_graph_module
from fxpeft.passes.torch_private import (
    COMPILED,
    FSDP,
    GROUPED_PRODUCTS,
    INNER,
    LINEAR,
    MODULE_CALL,
    ConstantSource,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    RecompileError,
    TorchDynamoException,
    ValueRanges,
    argument_names,
    captured_graphs,
    checkpoint_above,
    compilations,
    copy_each,
    count_waiting_call,
    cudagraph_skips,
    error_on_recompile,
    fake_mode_of,
    graph_counter,
    has_plain_arguments,
    import_block,
    in_backward,
    inner_backend,
    is_freezing,
    is_recorded,
    is_transformed,
    keep_sources,
    key_graph,
    mark_dynamic,
    parameter_sources,
    pytree,
    schema_of,
    skip_frame,
    symbolic_sizes,
    version_of,
    zero_each,
)


def test_a_skipped_frame_runs_and_dynamo_begins_with_what_it_calls() -> None:
    ran = []

    def inner(x: Tensor) -> Tensor:
        return x * 2

    def note() -> None:
        ran.append(torch.compiler.is_dynamo_compiling())

    def outer(x: Tensor) -> Tensor:
        note()
        return inner(x)

    skip_frame(outer)
    skip_frame(note, deep=True)
    counter = CompileCounter()
    compiled = torch.compile(outer, backend=counter, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert ran == [False, False]
    assert counter.frame_count == 1


def test_a_call_that_waits_lets_others_of_full_graphs_end() -> None:
    waits, ends, found = threading.Event(), threading.Event(), []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    def run(graph: GraphModule, inputs: Any) -> Any:
        def slow(*args: Any) -> Any:
            waits.wait(30)  # until the other call has begun to wait before its first frame
            return graph(*args)

        return slow

    def hook(*args: Any) -> None:
        if threading.current_thread().name == "waits":
            count_waiting_call()
            waits.set()
            ends.wait(30)

    skip_frame(hook, deep=True)
    model = Model()
    model.register_forward_pre_hook(hook)
    compiled = torch.compile(model, backend=run, fullgraph=True)
    thread = threading.Thread(target=lambda: found.append(compiled(torch.ones(2))), name="waits")
    waits.set()
    compiled(torch.ones(2))
    waits.clear()
    first = threading.Thread(target=lambda: found.append(compiled(torch.ones(2))), name="first")
    first.start()
    time.sleep(0.05)
    thread.start()
    first.join(30)
    ends.set()
    thread.join(30)
    assert len(found) == 2


def test_a_call_waits_where_dynamo_counts_no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10 and 2.11 don't; the test above says which torch lost the counter that it has."""
    monkeypatch.setattr(torch_private, "_count_frames", None)
    count_waiting_call()


def test_a_backward_knows_that_it_is_one() -> None:
    seen = [in_backward()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(in_backward()))
    x.sum().backward()
    assert seen == [False, True]


def test_a_reentrant_checkpoint_shows_its_context_in_forward_and_backward() -> None:
    found = []

    def watch() -> None:
        found.append(checkpoint_above(test_a_backward_knows_that_it_is_one.__code__))

    def part(x: Tensor) -> Tensor:
        (lambda: watch())()
        return x * x

    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=True).sum().backward()
    (context, forward), (again, backward) = found
    assert context is again
    assert (forward, backward) == (False, True)
    part(x)
    assert found[2] is None


def test_argument_names_of_nested_arguments() -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: dict[str, Tensor]) -> Tensor:
            """A sum."""
            return first + second["x"]

    program = torch.export.export(Two(), (torch.ones(2), {"x": torch.ones(2)}))
    assert argument_names(program.module().graph)[-2:] == ["first", "second"]
    assert argument_names(torch.fx.symbolic_trace(nn.ReLU()).graph) == []


def test_the_linear_that_nobody_replaced() -> None:
    assert LINEAR is torch.nn.functional.linear


def test_grouped_products_are_those_that_a_tensor_like_argument_sees() -> None:
    seen = []

    class Like:
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
            seen.append(function)

    torch.nn.functional.grouped_mm(torch.ones(4, 8), Like(), offs=torch.tensor([4], dtype=torch.int32))  # type: ignore[arg-type]
    torch.ops.aten._grouped_mm.default(torch.ones(4, 8), Like())
    assert len(seen) == 2
    assert set(seen) < GROUPED_PRODUCTS


def test_fsdp_marks_the_modules_whose_parameters_it_manages() -> None:
    from torch.distributed.fsdp import _dynamo_utils

    module = nn.Sequential(nn.Linear(2, 3))
    _dynamo_utils._annotate_modules_for_dynamo(module, set(), True)
    assert all(FSDP in vars(part) for part in module.modules())


def test_import_block() -> None:
    namespace: dict[str, object] = {}
    exec(import_block({"torch": torch, "Linear": nn.Linear}), namespace)
    assert namespace["Linear"] is nn.Linear


def test_torchs_cache_key_holds_what_a_graph_module_holds() -> None:
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCachePickler

    def key(passes: tuple[tuple[str, str], ...] | None) -> str:
        graph = torch.fx.symbolic_trace(nn.ReLU())
        key_graph(graph, passes)
        copy.deepcopy(graph)  # as Inductor does with cpp_wrapper
        return str(AOTAutogradCachePickler(graph).get_hash(graph))

    assert key((("mine", "1"),)) == key((("mine", "1"),)) != key((("mine", "2"),))
    with pytest.raises(Exception, match=r"stable cache key|pickle cache key"):  # torch 2.11
        key(None)


def test_a_fake_tensor_has_a_size_that_is_a_symbol_with_bounds() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    constraint = StrictMinMaxConstraint(vr=ValueRanges(2, 9), warn_only=False)
    sizes = [DimDynamic.DYNAMIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[constraint, None])
    fake = mode.from_tensor(torch.ones(3, 5), symbolic_context=context, source=ConstantSource("canary"))
    size = fake.shape[0]
    assert isinstance(size, torch.SymInt)
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    assert (bounds.lower, bounds.upper) == (2, 9)
    assert mode.from_tensor(torch.ones(3, 5), static_shapes=True).shape == (3, 5)
    with mode:
        assert (fake * 2).shape[1] == 5
    assert fake_mode_of(iter([1, fake])) is mode
    with mode, symbolic_sizes(), torch.no_grad():
        nn.functional.linear(torch.ones(2, 4, 5), fake)
    assert size.node.expr.is_Symbol, "which it wasn't after that, without, on torch 2.11"
    assert fake_mode_of([]) is None


def test_pytree_takes_arguments_apart_and_together() -> None:
    tree = ((1, {"b": 2.5, "a": [3]}), {"c": None})
    leaves, spec = pytree.tree_flatten(tree)
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert pytree.tree_structure(tree) == spec
    assert pytree.tree_leaves(tree) == leaves
    assert pytree.tree_map(str, (1, [2])) == ("1", ["2"])
    assert pytree.tree_map_only(float, lambda x: -x, tree)[0][1]["b"] == -2.5
    assert [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path([5, {"x": 6}])[0]] == ["[0]", "[1]['x']"]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)).num_leaves == len(leaves)


def test_operators_are_told_apart_and_have_a_schema() -> None:
    aten = torch.ops.aten
    assert isinstance(aten.add_.Tensor, OpOverload)
    assert isinstance(aten.add, OpOverloadPacket)
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator)
    assert str(torch.ops.higher_order.cond) == "cond"
    assert [schema_of(op).is_mutable for op in (aten.add_.Tensor, aten.add.Tensor)] == [True, False]
    assert schema_of(aten.add_.Tensor).name == "aten::add_"
    assert schema_of(len) is None


def test_a_tensor_knows_how_often_it_was_written() -> None:
    to, source = [torch.zeros(3), torch.zeros(2, 4)], [torch.arange(3.0), torch.ones(4, 2).t()]
    before = [version_of(t) for t in to]
    copy_each(to, source)
    assert all(map(torch.equal, to, source))
    assert all(version_of(t) > v for t, v in zip(to, before, strict=True))
    before = [version_of(t) for t in to]
    zero_each(to)
    assert not any(t.any() for t in to)
    assert all(version_of(t) > v for t, v in zip(to, before, strict=True))


def test_what_records_operators_is_known() -> None:
    found = []

    def asked(x: Tensor) -> Tensor:
        found.append(is_recorded())
        return x * 2

    x = torch.ones(3)
    asked(x)
    torch.jit.trace(asked, (x,), check_trace=False)
    for mode in ("real", "fake", "symbolic"):
        make_fx(asked, tracing_mode=mode)(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        asked(x)
    asked(x)
    assert found == [False, *[True] * 5, False]


def test_a_marked_size_is_a_symbol_from_the_first_call() -> None:
    counter = graph_counter()
    compiled = torch.compile(lambda x: x * 2 + x.size(0), backend=counter)
    for size in (5, 3, 9):
        x = torch.ones(size)
        mark_dynamic(x, 0, 2, 9)
        assert torch.equal(compiled(x), torch.full((size,), 2.0 + size))
    assert counter.frame_count == 1
    assert counter.op_count >= 2


def test_a_copy_of_dynamos_graph_says_where_its_inputs_come_from() -> None:
    found: list[GraphModule] = []

    def backend(graph_module: GraphModule, inputs: Any) -> Any:
        copied = copy_graph_module(graph_module)
        keep_sources(graph_module, copied)
        found.extend((graph_module, copied))
        return graph_module

    torch.compile(nn.Linear(3, 2), backend=backend)(torch.ones(1, 3))
    graph_module, copied = found
    assert parameter_sources(graph_module) is not None
    assert parameter_sources(copied) is parameter_sources(graph_module)
    sources = [getattr(n, "_dynamo_source", None) for n in graph_module.graph.nodes if n.op == "placeholder"]
    assert len([s for s in sources if s is not None]) == 3
    assert [getattr(n, "_dynamo_source", None) for n in copied.graph.nodes if n.op == "placeholder"] == sources
    assert parameter_sources(torch.fx.symbolic_trace(nn.ReLU())) is None


def test_a_graph_knows_whether_its_arguments_are_nested() -> None:
    program = torch.export.export(nn.ReLU(), (torch.ones(2),))
    assert has_plain_arguments(torch.fx.symbolic_trace(nn.ReLU()).graph)
    assert has_plain_arguments(program.graph)
    assert not has_plain_arguments(program.module().graph)


def test_backends_are_found_by_name() -> None:
    graph_module = torch.fx.symbolic_trace(nn.ReLU())
    found: list[Any] = []

    def own(graph: Any, inputs: Any, **given: Any) -> Any:
        found.append(given)
        return graph

    for backend, mode, options in (("eager", None, {}), (own, None, {"a": 1}), (own, "m", {}), (own, "default", {})):
        run = inner_backend(backend, mode, options, None)(graph_module, [])
        assert torch.equal(run(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert found == [{"options": {"a": 1}}, {"mode": "m"}, {}]


def test_inductor_takes_modes_and_options() -> None:
    wrapper: Any = inner_backend("inductor", "max-autotune", {}, True)
    assert wrapper.config == torch._inductor.list_mode_options("max-autotune")
    assert inner_backend("inductor", None, {"cpp_wrapper": True}, None).config == {"cpp_wrapper": True}  # type: ignore[attr-defined]
    for mode, options in (("fast", {}), (None, {"cpp": True}), (None, {"cpp_wrapper": "yes"})):
        with pytest.raises(RuntimeError, match=r"fast|cpp"):
            inner_backend("inductor", mode, options, None)


def test_freezing_is_seen() -> None:
    import torch._inductor.config as config

    assert not is_freezing()
    with config.patch(freezing=True):
        assert is_freezing()


@pytest.mark.slow
def test_a_graph_is_compiled_ahead_into_an_archive(tmp_path: Path) -> None:
    x, path = torch.arange(5.0), tmp_path / "canary.pt2"
    program = torch.export.export(nn.ReLU(), (x,))
    files = torch_private.aot_compile(program.module(), (x,), {}, {"aot_inductor.package": True})
    torch_private.package_files(str(path), files, {"text": "a text"})
    held = torch_private.load_package(str(path))
    assert torch.equal(held.aoti_runners["model"](x - 2), (x - 2).relu())
    assert held.extra_files["text"] == "a text"


def test_dynamo_counts_what_it_captures_and_names_why_it_recompiled() -> None:
    torch.compiler.reset()
    graphs, _ = captured_graphs()
    earlier = set(map(id, compilations()))

    def function(x: Tensor, by: float) -> Tensor:
        return x * by

    compiled = torch.compile(function, backend="eager", dynamic=False)
    compiled(torch.ones(2), 2.0)
    with error_on_recompile(), pytest.raises(RecompileError, match="by"):
        compiled(torch.ones(2), 3.0)
    compiled(torch.ones(2), 4.0)
    assert captured_graphs()[0] > graphs
    new = [c for c in compilations() if id(c) not in earlier]
    new = [c for c in new if c.co_name == "function"]
    assert new[0].recompile_reason is None
    assert any(c.recompile_reason and c.fail_type is None for c in new)


def test_a_graph_break_has_a_reason() -> None:
    _, before = captured_graphs()

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(TorchDynamoException):
        torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(2))
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert sum(captured_graphs()[1].values()) > sum(before.values())


def test_wrappers_hold_their_module_under_these_names() -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    module = nn.ReLU()
    compiled: Any = torch.compile(module)
    assert compiled._modules[INNER[0]] is module
    assert INNER[1] == _common_utils.FSDP_WRAPPED_MODULE
    assert checkpoint_wrapper.checkpoint_wrapper(module)._modules[INNER[2]] is module


def test_a_module_that_was_compiled_in_place_shows_it() -> None:
    module = nn.ReLU()
    assert getattr(module, COMPILED) is None
    module.compile(backend="eager")
    assert getattr(module, COMPILED) is not None


def test_a_modules_call_is_the_frame_around_its_hooks() -> None:
    callers = []

    def hook(*args: Any) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            callers.append(frame.f_code)
            frame = frame.f_back

    module = nn.ReLU()
    module.register_forward_pre_hook(hook)
    module(torch.ones(1))
    assert callers.count(MODULE_CALL) == 1


def test_graphs_of_which_inductor_makes_no_cuda_graph_are_counted() -> None:
    before = cudagraph_skips()
    torch.compile(lambda x: x.sin() + 1, mode="reduce-overhead")(torch.ones(3))  # on a CPU there is none
    assert cudagraph_skips() == before + 1


def test_transforms_and_forward_mode_are_seen() -> None:
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(is_transformed())
        return x.square().sum()

    call(torch.ones(2))
    torch.func.grad(call)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        call(torch.ones(2))
    call(torch.ones(2))
    assert seen == [False, True, True, False]
