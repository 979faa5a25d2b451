"""The stacks of a grouped graph are always what the slots hold, whoever wrote them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from adapter_files import add
from closeness import assert_close
from test_group import TARGETS, Block, Net, X, grouped, prepared, slots_of, stacks_of
from torch import Tensor, nn

import fxpeft
from fxpeft.passes.slots.stack import stack_of

pytestmark = pytest.mark.usefixtures("fresh_graphs")


def compiled_and_warm(**options: Any) -> tuple[nn.Module, Any]:
    model = prepared(layers=1)
    compiled = grouped(model, inner="eager", fullgraph=True, **options)
    with torch.no_grad():
        compiled(X)
    assert len(stacks_of(model)) == 2
    return model, compiled


def check(model: nn.Module, compiled: Any, x: Tensor = X) -> None:
    with torch.no_grad():
        assert_close(compiled(x), model(x))


def test_only_the_ranks_in_use_are_copied() -> None:
    model, compiled = compiled_and_warm()
    fxpeft.set_adapter(model, "two")
    stack = stacks_of(model)[0]
    before = stack.tensor.clone()
    assert torch.equal(stack.tensor, before)  # a swap writes no stack
    check(model, compiled)
    assert torch.equal(stack.tensor[2:], before[2:])
    assert not torch.equal(stack.tensor[:2], before[:2])


def test_rows_read_ranks_behind_those_of_the_active_adapter() -> None:
    torch.manual_seed(0)
    model = Net(Block("")).eval()
    vars(model)["dummy_inputs"] = {"x": X}
    fxpeft.prepare_hotswap(model, 12, targets=TARGETS, lanes=3)
    for seed, (name, rank) in enumerate({"one": 3, "other": 4, "active": 2}.items()):
        add(model, fxpeft.LoraConfig(r=rank, target_modules=TARGETS), name, seed)
    compiled = grouped(model, inner="eager", fullgraph=True)
    check(model, compiled)
    for names in (["one", "other"], ["other", "active"], [None, "one"]):
        with fxpeft.rows(model, names):
            check(model, compiled)
    check(model, compiled)


def test_ranks_that_an_earlier_adapter_left_behind() -> None:
    """NaN of an adapter that is gone, beyond the rank in use: a later one of higher rank must not see it."""
    model, compiled = compiled_and_warm()
    for slot in slots_of(model):
        slot.a.fill_(torch.nan)
    with torch.no_grad():
        assert compiled(X).isnan().any()
    for name in ("two", "some", "first", "full"):
        fxpeft.set_adapter(model, name)
        check(model, compiled)
        assert torch.isfinite(model(X)).all()


def test_a_swap_that_fails_leaves_the_old_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = compiled_and_warm()
    fxpeft.set_adapter(model, "two")
    with torch.no_grad():
        wanted = compiled(X)
    from fxpeft.serving import swap

    real, calls = swap.show_copies, []

    def broken(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("in the middle")
        real(*args)

    monkeypatch.setattr(swap, "show_copies", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        fxpeft.set_adapter(model, "full")
    assert len(calls) == 2
    with torch.no_grad():
        assert_close(compiled(X), wanted, terms=1, size=1.0)
    check(model, compiled)


def test_slots_that_moved_and_copies_of_a_model() -> None:
    model, compiled = compiled_and_warm()
    twin = copy.deepcopy(model)
    assert not stacks_of(twin)
    fxpeft.set_adapter(twin, "two")
    check(model, compiled)
    check(twin, grouped(twin, inner="eager", fullgraph=True))
    assert {id(s) for s in stacks_of(twin)}.isdisjoint(id(s) for s in stacks_of(model))
    model.to(torch.float64)
    assert not stacks_of(model)
    again = grouped(model, inner="eager", fullgraph=True)
    for name in ("full", "some"):
        fxpeft.set_adapter(model, name)
        check(model, again, X.double())
    assert {s.tensor.dtype for s in stacks_of(model)} == {torch.float64}
    model[0].k.to(torch.float64)  # one of the group alone
    model[0].k.slot._buffers["a"] = model[0].k.slot.a.clone()
    model[0].k.slot._announce()
    check(model, grouped(model, inner="eager", fullgraph=True), X.double())
    assert len(stacks_of(model)) == 2  # the one of the old tensor is gone


def test_made_in_inference_mode_and_read_outside() -> None:
    model = prepared(layers=1)
    compiled = grouped(model, inner="eager", fullgraph=True)
    with torch.inference_mode():
        compiled(X)
    for name in ("two", "full"):
        fxpeft.set_adapter(model, name)
        check(model, compiled)


def test_nothing_is_made_that_is_not_read() -> None:
    model = prepared(layers=1)
    fxpeft.disable_adapters(model)
    compiled = grouped(model, inner="eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        assert not stacks_of(model)
        fxpeft.enable_adapters(model)
        compiled(X)
    made = [weakref.ref(s) for s in stacks_of(model)]
    assert len(made) == 2
    fxpeft.release_hotswap(model)
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_tensors_without_a_slot_are_stacked_each_time() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(stack_of([a, b], {}), torch.stack([a, b], 1))


def test_a_forward_on_a_thread_sees_one_adapter_whole() -> None:
    model, compiled = compiled_and_warm()
    names = ["full", "two", "some", "first"]
    wanted = {}
    with torch.no_grad():
        for name in names:
            fxpeft.set_adapter(model, name)
            wanted[name] = compiled(X)
    wrong: list[float] = []
    stop = threading.Event()
    seen = set[str]()

    def forwards() -> None:
        with torch.no_grad():
            while not stop.is_set():
                output = compiled(X)
                distances = {name: float((output - value).abs().max()) for name, value in wanted.items()}
                nearest = min(distances, key=distances.__getitem__)
                seen.add(nearest)
                if not distances[nearest] < 1e-5:
                    wrong.append(distances[nearest])

    threads = [threading.Thread(target=forwards) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(400):
        fxpeft.set_adapter(model, names[number % len(names)])
        if number % 40 == 0:
            threading.Event().wait(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen) > 1
