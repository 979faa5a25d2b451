"""What a swap from memory does, counted: as many copies as there are shapes, and nothing per loaded adapter."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from calls import calls_of
from closeness import is_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.serving.swap import serving_of

LAYERS, RANK = 9, 5
TARGETS = ["up", "gate", "down"]


class Block(nn.Module):
    """Three linears of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(10, 14), nn.Linear(10, 14), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, 10]`` to the same."""
        return x + self.down(self.up(x).tanh() * self.gate(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*(Block() for _ in range(LAYERS))))).eval()


X = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> fxpeft.LoraConfig:
    return fxpeft.LoraConfig(
        **{"r": RANK, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **fields}
    )


def prepared(
    *configs: fxpeft.LoraConfig, methods: tuple[str, ...] = ("lora",), model: nn.Module | None = None
) -> nn.Module:
    """A prepared model with an adapter ``a0``, ``a1``, ... of each config, the last one active."""
    model = model or net()
    fxpeft.prepare_hotswap(model, 16, targets=TARGETS, methods=methods)
    for number, each in enumerate(configs):
        torch.manual_seed(number)
        fxpeft.add_adapter(model, each, f"a{number}")
        values = state_of(model).adapters[f"a{number}"].values
        assert any(bool(t.any()) for own in values.sites.values() for n, t in own.items() if "B" in n)
    return model


class Writes(TorchDispatchMode):
    """How many calls of torch write, and how many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes, self.all = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        if func._schema.is_mutable:
            first = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls += len(first)
            self.bytes += sum(t.nbytes for t in first)
        return func(*args, **(kwargs or {}))


def bytes_of(model: nn.Module, name: str) -> int:
    adapter = state_of(model).adapters[name]
    return sum(t.nbytes for v in adapter.lowered.values() for t in v if t is not None)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "all sites": ({}, {}, 6),
    "some names": ({"target_modules": ["up", "down"]}, {"target_modules": ["up", "down"]}, 6),
    "some layers": ({"target_modules": r"layers\.[2-5]\..*"}, {"target_modules": r"layers\.[2-5]\..*"}, 9),
    "a rank of its own": ({"rank_pattern": {"gate": 3}}, {"rank_pattern": {"gate": 3}}, 9),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_into_the_slots_in_a_handful_of_copies(case: str, dtype: torch.dtype) -> None:
    """A copy for each factor and name at the most, however many layers there are, of the adapter's bytes alone."""
    first, second, most = CASES[case]
    model = prepared(config(**first), config(**second), model=net().to(dtype))
    for name in ("a0", "a1"):
        fxpeft.set_adapter(model, name)  # prepared, and old ranks zeroed
    with Writes() as writes:
        fxpeft.set_adapter(model, "a0")
    assert 0 < writes.calls <= most
    lowered = state_of(model).adapters["a0"].lowered
    assert writes.bytes == sum((v.a.numel() + v.b.numel()) * dtype.itemsize + v.d.nbytes for v in lowered.values())


def test_gains_and_shifts_go_with_the_factors() -> None:
    model = prepared(config(use_dora=True), config(use_dora=True), methods=("dora",))
    wanted = {}
    for name in ("a1", "a0"):
        fxpeft.set_adapter(model, name)
        wanted[name] = model(X)
    with Writes() as writes:
        fxpeft.set_adapter(model, "a1")
    assert writes.calls <= 12
    assert writes.bytes == bytes_of(model, "a1")
    assert torch.equal(model(X), wanted["a1"])
    assert not is_close(wanted["a0"], wanted["a1"])


def test_slots_stay_where_they_are() -> None:
    model = prepared(config(), config(r=9), config(target_modules=["gate"]))
    slots = serving_of(state_of(model)).slots.values()

    def places() -> list[int]:
        return [buffer.data_ptr() for slot in slots for buffer in slot.buffers()]

    before = places()
    for names in ("a0", ["a0", "a2"], "a1", [], "a2"):
        fxpeft.set_adapter(model, names)
        fxpeft.set_scale(model, "a2", 0.5)
        fxpeft.disable_adapters(model)
        fxpeft.enable_adapters(model)
        model.to("cpu", torch.float32)
    assert places() == before


def test_an_adapter_is_in_memory_once() -> None:
    """Values and slot values are one piece of memory; another scale takes new scales alone."""
    model = prepared(config())
    adapter = state_of(model).adapters["a0"]
    assert adapter.room is not None
    assert len(adapter.room.pieces) == 1
    assert all(adapter.room.span(t) for own in adapter.values.sites.values() for t in own.values())
    assert adapter.room.pieces[0].nbytes < 1.3 * bytes_of(model, "a0")
    factors = adapter.room.pieces[0].data_ptr()
    before = model(X)
    for scale in (0.5, 0.25, 2.0, 1.0):
        fxpeft.set_scale(model, "a0", scale)
        room = state_of(model).adapters["a0"].room
        assert room is not None
        assert len(room.pieces) == 2  # the factors' and the scales'
        assert room.pieces[1].data_ptr() == factors
    assert torch.equal(model(X), before)


def test_a_pickle_has_an_adapter_once() -> None:
    model = prepared(*[config()] * 4)
    size = sum(bytes_of(model, f"a{n}") for n in range(4))
    slots = sum(p.nbytes for p in next(iter(serving_of(state_of(model)).slots.values())).room.pieces)  # type: ignore[union-attr]
    base = sum(p.nbytes for p in net().parameters())
    pickled = pickle.dumps(model)
    assert len(pickled) < 2 * (size + slots + base) + 400_000
    twin = pickle.loads(pickled)
    for name in ("a0", "a3"):
        fxpeft.set_adapter(model, name)
        fxpeft.set_adapter(twin, name)
        assert torch.equal(model(X), twin(X))
    fxpeft.set_adapter(twin, "a1")
    fxpeft.set_adapter(twin, "a0")
    with Writes() as writes:
        fxpeft.set_adapter(twin, "a1")
    assert writes.calls <= 6


def test_parameters_after_a_release_share_no_memory() -> None:
    model = prepared(config(), config(use_dora=True), methods=("lora", "dora"))
    before = model(X)
    fxpeft.release_hotswap(model)
    assert is_close(model(X), before)
    own = [p for n, p in model.named_parameters() if "lora" in n]
    assert len({p.untyped_storage().data_ptr() for p in own}) == len(own) == LAYERS * 3 * 5
    assert all(adapter.room is None for adapter in state_of(model).adapters.values())
    assert len(pickle.dumps(model)) < 2 * sum(p.nbytes for p in model.parameters()) + 800_000


def test_a_swap_does_the_same_beside_a_thousand_others() -> None:
    model = prepared(config(), config())
    found = []
    for count in (2, 1000):
        state = state_of(model)
        for number in range(len(state.adapters), count):
            state.adapters[f"a{number}"] = state.adapters["a0"]
        for name in ("a0", "a1"):
            fxpeft.set_adapter(model, name)
        with Writes() as writes:
            fxpeft.set_adapter(model, "a0")
        found.append((calls_of(lambda: fxpeft.set_adapter(model, "a1")), writes.all))
    assert found[0] == found[1]
    assert 0 < found[0][0] < 600
