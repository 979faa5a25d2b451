"""Swaps beside forwards: no forward sees a mixture, and none runs inside another's."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from served import IDS, base, folder, fresh, output, prepared
from torch import nn
from torch.fx import GraphModule

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.passes.slots.copies import Copies
from fxpeft.serving import guard, swap


def mixtures(model: nn.Module, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Swap while three threads run forwards, with a pause in the middle of each swap; count wrong outputs."""
    allowed = [fresh(source) for source in sources]
    stop, wrong, errors = threading.Event(), [], []

    def slow(self: Copies) -> None:
        half = len(self.pairs) // 2
        whole(Copies(self.pairs[:half]))
        time.sleep(0.02)
        whole(Copies(self.pairs[half:]))

    def forward() -> None:
        try:
            while not stop.is_set():
                found = output(model)
                wrong.append(not any(torch.allclose(found, one, rtol=0, atol=1e-5) for one in allowed))
        except BaseException as error:
            errors.append(error)
            raise

    whole = Copies.run
    monkeypatch.setattr(Copies, "run", slow)
    threads = [threading.Thread(target=forward) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(20):
        fxpeft.set_adapter(model, str(i % len(sources)))
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert len(wrong) > 20
    return sum(wrong)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_no_forward_ever_sees_a_mixture(
    way: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = base()
    sources = [old, new, folder(tmp_path / "third", 9, r=8, target_modules=["q_proj", "up_proj"])]
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["lm_head"], bias="all")
    for i, source in enumerate(sources):
        fxpeft.load_adapter(model, source, str(i))
    called = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else model
    output(called)
    assert mixtures(called, sources, monkeypatch) == 0


def test_the_mixture_check_can_fail(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["lm_head"], bias="all")
    for i, source in enumerate([old, new]):
        fxpeft.load_adapter(model, source, str(i))
    guard.unguard_forwards(model)
    assert mixtures(model, [old, new], monkeypatch) > 0


def test_hold_keeps_swaps_out_of_several_forwards(old: str, new: str) -> None:
    model = prepared(old)
    swapped = threading.Event()

    def change() -> None:
        fxpeft.hotswap(model, new)
        swapped.set()

    thread = threading.Thread(target=change)
    with fxpeft.hold(model):
        first = output(model)
        thread.start()
        assert not swapped.wait(0.2)
        assert torch.equal(output(model), first)
    thread.join(timeout=60)
    assert swapped.is_set()
    assert_close(output(model), fresh(new))


def test_a_swap_inside_its_own_forward_is_refused(old: str) -> None:
    model = prepared(old)
    with fxpeft.hold(model), pytest.raises(RuntimeError, match="swap after it"):
        fxpeft.disable_adapters(model)


def test_an_error_in_a_forward_gives_the_lock_back(old: str, new: str) -> None:
    model = prepared(old)
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 999))
    fxpeft.hotswap(model, new)  # would wait for ever
    assert_close(output(model), fresh(new))


def test_a_prepared_model_inside_a_larger_compiled_function(old: str, new: str) -> None:
    torch._dynamo.reset()
    model = prepared(old)
    function = torch.compile(lambda ids: model(ids).logits * 2, backend="eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(function(IDS), fresh(old) * 2)
        fxpeft.hotswap(model, new)
        assert_close(function(IDS), fresh(new) * 2)


def test_deleting_and_rescaling_stored_adapters(old: str, new: str) -> None:
    model = prepared(old)
    fxpeft.load_adapter(model, new, "new")
    fxpeft.set_scale(model, "new", 0.5)
    reference = base()
    fxpeft.load_adapter(reference, new, "new")
    fxpeft.set_scale(reference, "new", 0.5)
    assert_close(output(model), output(reference))
    fxpeft.delete_adapter(model, "new")
    assert_close(output(model), output(base()))
    fxpeft.set_adapter(model, "default")
    assert_close(output(model), fresh(old))


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_compiled_model_of_torchs_own_class_keeps_swaps_out(way: str) -> None:
    """Dynamo inlines the hooks of such a root."""
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    fxpeft.prepare_hotswap(model, 4)
    readers, depths = swap.serving_of(state_of(model)).lock.readers, []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            depths.append(len(readers))
            return graph(*args)

        return run

    if way == "torch.compile":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
        compiled = model
    x = torch.ones(2, 4)
    for _ in range(2):
        compiled(x)
    assert depths == [1, 1]
    assert isinstance(model, nn.Sequential)
    torch.testing.assert_close(compiled(x), model[0](x))
    fxpeft.remove(model)
    assert type(model) is nn.Sequential
