"""Regional compilation, by accelerate and as diffusers does it, with slots before and after: swaps compile nothing."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import TorchDynamoPlugin, compile_regions
from block_nets import CONFIGS, MAX_RANK, TARGETS, Net, check_swaps, inputs, net, outputs, prepared, with_adapters
from closeness import assert_close
from swapping import lock_of
from torch import Tensor, nn

import fxpeft
from fxpeft.testing import count_graphs, no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
X = inputs()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    def forget() -> None:  # of the process: a Trainer of another test has left its own there
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="inductor", use_regional_compilation=True))
    forget()


def compile_repeated_blocks(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """As diffusers' ``ModelMixin.compile_repeated_blocks`` does."""
    for module in model.modules():
        if type(module).__name__ == name:
            module.compile(**options)
    return model


def slots(model: nn.Module) -> None:
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=TARGETS)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "accelerate": lambda model: compile_regions(model, fullgraph=True),
    "diffusers": lambda model: compile_repeated_blocks(model, "Block", fullgraph=True),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_every_swap_in_the_graph_of_one_block(way: str, when: str) -> None:
    if when == "before":
        model = prepared()
        compiled = WAYS[way](model)
    else:
        compiled = model = WAYS[way](net())
        slots(with_adapters(model))
    with no_recompiles(), count_graphs() as counted, torch.no_grad():
        compiled(X)
        check_swaps(compiled, compiled, X)
        check_swaps(model, compiled, X)
    assert counted.graphs == 1  # both blocks run it
    assert not any("_orig_mod" in key for key in fxpeft.adapter_state_dict(compiled))


@pytest.mark.parametrize("when", ["before", "after"])
def test_through_the_accelerator(when: str, accelerator: Accelerator, tmp_path: Any) -> None:
    bare = net()
    if when == "before":
        slots(with_adapters(bare))
    model: Any = accelerator.prepare(bare)
    if when == "after":
        slots(with_adapters(model))
    assert type(model.eval().blocks[0]).__name__ == "OptimizedModule"
    with no_recompiles(), count_graphs() as counted, torch.no_grad():
        model(X)
        check_swaps(model, model, X)
    assert counted.graphs == 1
    for number, each in enumerate((model, accelerator.unwrap_model(model, keep_torch_compile=False))):
        assert list(fxpeft.loaded_adapters(each)) == list(CONFIGS)
        fxpeft.save_adapter(each, tmp_path / str(number), "five")
        other = net()
        fxpeft.load_adapter(other, tmp_path / str(number))
        assert_close(other(X), outputs(X)["five"])


@pytest.mark.parametrize("removed", ["what was compiled", "what it was made of"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_removed_is_removed_of_both(when: str, removed: str) -> None:
    bare = net()
    if when == "before":
        slots(with_adapters(bare))
    compiled = compile_regions(bare, backend="eager")
    if when == "after":
        slots(with_adapters(compiled))
    fxpeft.remove(compiled if removed == "what was compiled" else bare)
    for model in (bare, compiled):
        assert torch.equal(model(X), net()(X))
        with pytest.raises(fxpeft.AdapterError, match="has no adapters"):
            fxpeft.set_adapter(model, "full")  # it reached slots that nobody reads
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == []
    assert [type(m) for m in bare.modules()] == [type(m) for m in net().modules()]
    for model in (compiled, bare):  # both can have others now
        five = {"five": CONFIGS["five"]}
        with_adapters(model, five)
        assert_close(model(X), outputs(X, five)["five"])
        fxpeft.remove(model)


def test_a_shallow_copy_is_bare_too() -> None:
    """The kind: a copy that shares the attributes, and blocks, of a model."""
    model = with_adapters(net())
    twin = copy.copy(model)
    fxpeft.remove(model)
    with pytest.raises(fxpeft.AdapterError, match="has no adapters"):
        fxpeft.set_adapter(twin, "full")


@pytest.mark.parametrize("called", ["what was compiled", "what it was made of"])
def test_a_call_holds_the_whole_model(called: str) -> None:
    """Swaps wait until all blocks of a call are done, whichever of the two is called."""
    bare = net()
    compiled: Any = compile_regions(bare, backend="eager")
    slots(with_adapters(compiled))
    wanted, model = outputs(X), compiled if called == "what was compiled" else bare
    began, lock = threading.Event(), lock_of(bare)

    @torch.compiler.disable
    def in_first_block(*args: Any) -> None:
        began.set()
        deadline = time.monotonic() + 5
        while not lock.claim and time.monotonic() < deadline:
            time.sleep(0.001)  # until the swap waits

    def swap() -> None:
        began.wait(5)
        fxpeft.set_adapter(compiled, "full")

    handle = bare.blocks[0].query.register_forward_pre_hook(in_first_block)  # type: ignore[union-attr]
    thread = threading.Thread(target=swap)
    thread.start()
    with torch.no_grad():
        first = model(X)
        thread.join(30)
        handle.remove()
        assert began.is_set()
        assert_close(first, wanted["one"])
        assert_close(model(X), wanted["full"])


def test_training_with_regions(accelerator: Accelerator) -> None:
    def gradients(model: Any, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "out"]))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for value in fxpeft.adapter_state_dict(model).values():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        call(X).square().sum().backward()
        return dict(zip(fxpeft.adapter_state_dict(model), _grads(model), strict=True))

    eager = net()
    wanted = gradients(eager, eager)
    model: Any = accelerator.prepare(net())
    found = gradients(model, model)
    assert found.keys() == wanted.keys()
    assert len(found) == 8
    for key, value in wanted.items():
        assert float(value.abs().max()) > 0
        assert_close(found[key], value)


def _grads(model: Net) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]
