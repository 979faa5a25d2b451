"""Records and slots change together; a swap that breaks off leaves the old adapter; memory that moved is found."""

from __future__ import annotations

import copy
import ctypes
import functools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swapping import NAMES, Block, X, close, fresh, is_free, lock_of, net, prepared, slow_swaps, threads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.passes.slots.copies import Copies
from fxpeft.serving.swap import serving_of

# --- records and slots ---


@functools.cache
def _tensors(folder: str) -> dict[str, Tensor]:
    return load_file(f"{folder}/adapter_model.safetensors")


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


def _as_records_say(model: nn.Module, folders: dict[str, str]) -> Tensor:
    """What a bare model gives with the adapters that the records name, at their scales."""
    state, twin = state_of(model), net()
    for name, adapter in state.adapters.items():
        held = fxpeft.adapter_state_dict(model, name)
        source = next(f for f in folders.values() if _equal(_tensors(f), held))
        fxpeft.load_adapter(twin, source, name)
        fxpeft.set_scale(twin, name, adapter.strength)
    fxpeft.set_adapter(twin, state.active)
    if not state.enabled:
        fxpeft.disable_adapters(twin)
    with torch.no_grad():
        return twin(X)


@pytest.mark.parametrize("way", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swaps_and_forwards_of_many_threads_leave_records_slots_and_files_in_agreement(
    way: str, folders: dict[str, str], outputs: dict[str, Tensor]
) -> None:
    torch._dynamo.reset()
    model = prepared(folders)
    called = model if way == "eager" else torch.compile(model, fullgraph=True)
    allowed = [*outputs.values(), fresh(None)]
    for name, folder in folders.items():  # at half its scale
        twin = net()
        fxpeft.load_adapter(twin, folder, name)
        fxpeft.set_scale(twin, name, 0.5)
        with torch.no_grad():
            allowed.append(twin(X))
    with torch.no_grad():
        called(X)
    wrong: list[bool] = []
    counts = [0] * 4

    def forward() -> None:
        with torch.no_grad():
            wrong.append(not close(called(X), *allowed))

    def swapper(number: int) -> Callable[[], None]:
        chance = random.Random(number)

        def swap() -> None:
            name, verb = chance.choice(NAMES), chance.randrange(6)
            if verb <= 1:
                fxpeft.set_adapter(model, name)
            elif verb == 2:
                fxpeft.set_scale(model, name, chance.choice((0.5, 1.0)))
            elif verb == 3:
                fxpeft.disable_adapters(model) if chance.random() < 0.3 else fxpeft.enable_adapters(model)
            elif verb == 4:
                fxpeft.hotswap(model, folders[name], name)
            else:  # names of this thread's own come and go
                own = f"{name}-{number}"
                fxpeft.load_adapter(model, folders[name], own)
                fxpeft.set_adapter(model, name)
                fxpeft.delete_adapter(model, own)
            counts[number] += 1

        return swap

    with slow_swaps(0.001), threads(*[swapper(i) for i in range(4)], *[forward] * 4):
        done = threading.Event()
        for _ in range(600):
            if min(counts) >= 12 and len(wrong) >= 60:
                break
            done.wait(0.05)
    assert min(counts) >= 12
    assert len(wrong) >= 60
    assert sum(wrong) == 0
    assert is_free(model)
    state, serving = state_of(model), serving_of(state_of(model))
    assert set(state.adapters) == set(NAMES)
    assert [a.name for a in serving.shown] == (state.active if state.enabled else [])
    assert all(a is state.adapters[a.name] for a in serving.shown)
    with torch.no_grad():
        assert close(called(X), _as_records_say(model, folders))
        fxpeft.enable_adapters(model)
        for name in NAMES:
            fxpeft.set_adapter(model, name)
            fxpeft.set_scale(model, name, 1.0)
            assert close(called(X), outputs[name])


def test_threads_that_load_the_same_name_leave_one_adapter(folders: dict[str, str], outputs: dict[str, Tensor]) -> None:
    model = prepared({"a": folders["a"]})
    with ThreadPoolExecutor(4) as pool:
        tries = [pool.submit(fxpeft.load_adapter, model, folders["b"], "same") for _ in range(8)]
        errors = [task.exception(60) for task in tries]
    assert sum(error is None for error in errors) == 1
    assert all("an adapter named 'same' already" in str(error) for error in errors if error is not None)
    assert close(model(X), outputs["b"])


# --- swaps that break off ---


class _Failing(TorchDispatchMode):
    """Raises in the n-th operation that writes, once or from then on."""

    def __init__(self, number: int, error: BaseException, *, persistent: bool = False) -> None:
        super().__init__()
        self.left, self.error, self.persistent, self.raised = number, error, persistent, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.persistent):
                self.raised = True
                raise self.error
        return func(*args, **(kwargs or {}))


def _everything(model: nn.Module) -> tuple[Any, ...]:
    state = state_of(model)
    with torch.no_grad():
        output = model(X)
    records = list(state.adapters), list(state.active), state.enabled, [a.strength for a in state.adapters.values()]
    return output, records, list(map(id, state.adapters.values()))


def _same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    return torch.equal(found[0], wanted[0]) and found[1:] == wanted[1:]


VERBS: dict[str, Callable[[nn.Module, dict[str, str]], None]] = {
    "set": lambda m, f: fxpeft.set_adapter(m, "c"),
    "several": lambda m, f: fxpeft.set_adapter(m, ["b", "c"]),
    "hotswap": lambda m, f: fxpeft.hotswap(m, f["c"], "a"),
    "state_dict": lambda m, f: fxpeft.hotswap(m, _tensors(f["b"]), "a", config=fxpeft.adapter_config(m, "b")),
    "load": lambda m, f: fxpeft.load_adapter(m, f["c"], "new"),
    "scale": lambda m, f: fxpeft.set_scale(m, "a", 0.25),
    "off": lambda m, f: fxpeft.disable_adapters(m),
    "delete": lambda m, f: fxpeft.delete_adapter(m, "a"),
    "fold": lambda m, f: fxpeft.fold(m),
}
ERRORS = (RuntimeError("Inplace update to inference tensor"), MemoryError(), KeyboardInterrupt())


def _transposed(model: nn.Module) -> None:
    """Let every slot write go through torch, none by address."""
    for slot in serving_of(state_of(model)).slots.values():
        for name in ("a", "b"):
            old = slot._buffers[name]
            slot._buffers[name] = old.t().contiguous().t()


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_in_any_write_leaves_the_old_adapter_bit_for_bit(
    verb: str, layout: str, folders: dict[str, str], outputs: dict[str, Tensor]
) -> None:
    model = prepared(folders)
    _tensors(folders["b"])
    if layout == "transposed":
        _transposed(model)
        fxpeft.set_adapter(model, "b")
        fxpeft.set_adapter(model, "a")
    before, writes = _everything(model), 0
    for number in range(1, 200):
        error = ERRORS[number % 3]
        with _Failing(number, error) as failing:
            try:
                VERBS[verb](model, folders)
            except BaseException as caught:
                if caught is not error:
                    raise
        if not failing.raised:
            break
        writes += 1
        assert is_free(model)
        assert _same(_everything(model), before), (number, error)
    assert writes >= 1
    assert not _same(_everything(model), before)  # at last it went through


def test_an_error_that_stays_lets_nobody_see_a_mixture(folders: dict[str, str], outputs: dict[str, Tensor]) -> None:
    """Neither the swap nor putting the old one back can write: forwards refuse until one can."""
    model = prepared(folders)
    _transposed(model)
    fxpeft.set_adapter(model, "a")
    before = _everything(model)
    for number in range(1, 50):
        with _Failing(number, MemoryError(), persistent=True) as failing:
            try:
                fxpeft.set_adapter(model, "c")
            except MemoryError:
                with pytest.raises(MemoryError):
                    model(X)
                assert fxpeft.active_adapters(model) == ["a"]
        if not failing.raised:
            break
        assert _same(_everything(model), before)
    assert number > 4
    assert close(model(X), outputs["c"])


@pytest.mark.parametrize("number", range(1, 8))
def test_an_interrupt_between_moves_of_memory(
    number: int, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(folders)
    before, left, move = _everything(model), [number], ctypes.memmove

    def interrupted(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        move(*args)

    monkeypatch.setattr(ctypes, "memmove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxpeft.set_adapter(model, "b")
    assert _same(_everything(model), before)


class _Refusing(Tensor):
    """A caller's tensor whose n-th read of any kind raises."""

    left = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.left -= 1
        if cls.left == 0:
            raise MemoryError
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_callers_tensor_that_fails_leaves_the_old_adapter(folders: dict[str, str]) -> None:
    model = prepared(folders)
    before = _everything(model)
    tensors = {k: t.as_subclass(_Refusing) for k, t in _tensors(folders["b"]).items()}
    config, failed = fxpeft.adapter_config(model, "b"), 0
    for number in range(1, 2000, 7):
        _Refusing.left = number
        try:
            fxpeft.hotswap(model, tensors, "a", config=config)
        except MemoryError:
            failed += 1
            _Refusing.left = 0
            assert _same(_everything(model), before)
        else:
            break
    _Refusing.left = 0
    assert failed > 2


@pytest.mark.parametrize("verb", ["refold", "fold"])
def test_an_error_in_any_write_of_a_fold_without_slots(verb: str, folders: dict[str, str]) -> None:
    model = net()
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    fxpeft.set_adapter(model, "a")
    if verb == "refold":
        fxpeft.fold(model)
    before, writes = _everything(model), 0
    for number in range(1, 60):
        with _Failing(number, ERRORS[number % 3]) as failing:
            try:
                fxpeft.refold(model, "b") if verb == "refold" else fxpeft.fold(model)
            except BaseException as caught:
                if caught is not ERRORS[number % 3]:
                    raise
        if not failing.raised:
            break
        writes += 1
        assert _same(_everything(model), before)
    assert writes > 2


# --- memory that moved ---


def _data(slot: nn.Module, name: str) -> None:
    slot._buffers[name].data = torch.zeros_like(slot._buffers[name])


def _set(slot: nn.Module, name: str) -> None:
    slot._buffers[name].set_(torch.zeros_like(slot._buffers[name]))


def _swap(slot: nn.Module, name: str) -> None:
    torch.utils.swap_tensors(slot._buffers[name], torch.zeros_like(slot._buffers[name]))


def _replace(slot: nn.Module, name: str) -> None:
    setattr(slot, name, torch.zeros_like(slot._buffers[name]))


def _convert(slot: nn.Module, name: str) -> None:
    slot.double().float()


@pytest.mark.parametrize("move", [_data, _set, _swap, _replace, _convert])
@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_slots_whose_memory_was_replaced_are_written_where_they_are(
    move: Callable[[nn.Module, str], None], name: str, folders: dict[str, str], outputs: dict[str, Tensor]
) -> None:
    model = prepared(folders)
    for _ in range(2):  # copies and views of each are prepared
        for each in NAMES:
            fxpeft.set_adapter(model, each)
    if move is _swap:
        for slot in serving_of(state_of(model)).slots.values():
            slot.windows.clear()  # torch swaps no tensor that a view leans on
        for adapter in state_of(model).adapters.values():
            adapter.copies = None
    for slot in serving_of(state_of(model)).slots.values():
        move(slot, name)
    for each in NAMES:
        fxpeft.set_adapter(model, each)
        assert close(model(X), outputs[each])


def test_copies_follow_their_tensors() -> None:
    to, source = torch.zeros(3, 5), torch.randn(3, 5)
    wide, narrow = torch.zeros(4, 2).t(), torch.randn(2, 4)
    copies = Copies([(to, source), (wide, narrow)])
    copies.run()
    old = to.untyped_storage()
    to.data, wide.data = torch.zeros(3, 5), torch.zeros(4, 2).t()
    source.set_(torch.randn(3, 5))
    kept = bytes(old)
    copies.run()
    assert torch.equal(to, source)
    assert torch.equal(wide, narrow)
    assert bytes(old) == kept


def test_preparing_one_model_leaves_anothers_copies_as_they_are(folders: dict[str, str]) -> None:
    model = prepared(folders)
    for name in NAMES * 2:
        fxpeft.set_adapter(model, name)
    held = {name: adapter.copies for name, adapter in state_of(model).adapters.items()}
    assert all(held.values())
    prepared(folders)
    for name in NAMES:
        fxpeft.set_adapter(model, name)
    assert {name: adapter.copies for name, adapter in state_of(model).adapters.items()} == held
    assert all(a.copies is held[n] for n, a in state_of(model).adapters.items())


def test_a_copy_of_a_model_is_swapped_on_its_own(folders: dict[str, str], outputs: dict[str, Tensor]) -> None:
    model = prepared(folders)
    twin = copy.deepcopy(model)
    fxpeft.set_adapter(twin, "c")
    fxpeft.set_adapter(model, "b")
    assert close(model(X), outputs["b"])
    assert close(twin(X), outputs["c"])
    assert lock_of(twin) is not lock_of(model)
    assert type(twin[0]) is type(model[0])
    assert isinstance(twin[0], Block)
