"""Canaries: each private API of torch that fxpeft uses still does what it is used for."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fxpeft.passes.torch_private import (
    FSDP,
    argument_names,
    checkpoint_above,
    count_waiting_call,
    import_block,
    in_backward,
    key_graph,
    skip_frame,
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
    with pytest.raises(Exception, match="stable cache key"):
        key(None)
