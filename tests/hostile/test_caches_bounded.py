"""What is done for ever does not grow: thousands of loads under fresh names, live and prepared."""

from __future__ import annotations

import gc
import linecache
import pickle
import statistics
import time
from pathlib import Path

import pytest
import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.passes.live import generated_class
from fxpeft.passes.recent import Recent

LOADS, WARM, KEPT = 2000, 200, 3


class Head(nn.Linear):
    """A class whose subclasses are all fxpeft's."""


def net() -> nn.Module:
    """Three sites of odd sizes."""
    torch.manual_seed(0)
    return nn.Sequential(Head(5, 7), nn.ReLU(), nn.Embedding(9, 3), nn.Linear(7, 3)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of several ranks, alphas and targets; one with a bias, one with a module."""
    found = []
    for number, (targets, values) in enumerate(
        [
            (["0"], {}), (["0", "3"], {"rank_pattern": {"3": 5}}), (["0", "2"], {"use_rslora": True}),
            (["3"], {"bias": "lora_only"}), (["0"], {"modules_to_save": ["3"]}),
        ]
    ):  # fmt: skip
        model, config = net(), fxpeft.LoraConfig(r=2 + number, lora_alpha=3 + number, target_modules=targets, **values)
        fxpeft.add_adapter(model, config)
        randomise(fxpeft.adapter_state_dict(model).values(), number)
        found.append(tmp_path_factory.mktemp("adapters") / str(number))
        fxpeft.save_adapter(model, found[-1])
    return found


def measured() -> dict[str, int]:
    """Everything that could grow."""
    gc.collect()
    classes = sum(1 for cls in Head.__subclasses__())
    sources = sum(1 for name in linecache.cache if name.startswith("<fxpeft") or "eval_with_key" in name)
    sources += len(torch.fx.graph_module._loader.eval_cache)
    return {"classes": classes, "sources": sources, "objects": len(gc.get_objects())}


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "prepared"])
def test_loads_under_fresh_names_leave_nothing(prepared: bool, folders: list[Path]) -> None:
    model, x = net(), torch.randn(2, 5)
    layers = nn.Sequential(model[0], model[1], model[3])
    if prepared:
        fxpeft.prepare_hotswap(model, 8, targets=["0", "2", "3"], bias="lora_only")
        folders = folders[:4]
    seconds: list[float] = []
    outputs: dict[int, Tensor] = {}
    before: dict[str, int] = {}
    for number in range(LOADS):
        start = time.perf_counter()
        fxpeft.load_adapter(model, folders[number % len(folders)], f"user-{number}")
        seconds.append(time.perf_counter() - start)
        output = layers(x)
        assert torch.equal(output, outputs.setdefault(number % len(folders), output))
        if number >= KEPT:
            fxpeft.delete_adapter(model, f"user-{number - KEPT}")
        if number == WARM - 1:
            before = measured()
    after = measured()
    assert after["classes"] <= before["classes"]
    assert after["sources"] <= before["sources"]
    assert after["objects"] <= before["objects"] + 200, "fewer than one object in nine loads"
    early, late = (statistics.median(part) for part in (seconds[WARM : 2 * WARM], seconds[-WARM:]))
    assert late < 3 * early
    assert len({o.sum().item() for o in outputs.values()}) == len(folders)


def test_a_load_costs_the_same_beside_hundreds_of_others(folders: list[Path]) -> None:
    model, seconds = net(), []
    for number in range(600):
        start = time.perf_counter()
        fxpeft.load_adapter(model, folders[1], f"user-{number}")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds[-100:]) < 4 * statistics.median(seconds[50:150])


def test_configs_that_differ_fill_no_cache_for_ever() -> None:
    model = net()
    fxpeft.prepare_hotswap(model, 8)
    limit = state_of(model).serving.plans.limit
    tensors = {f"base_model.model.0.lora_{k}.weight": v for k, v in (("A", torch.ones(2, 5)), ("B", torch.ones(7, 2)))}
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["0"]))
    for number in range(limit + 10):
        config = fxpeft.LoraConfig(r=2, lora_alpha=number, target_modules=["0"])
        fxpeft.hotswap(model, tensors, config=config)
    assert len(state_of(model).serving.plans) == limit


# --- the caches themselves ---


def test_what_was_used_last_stays() -> None:
    cache: Recent[int, str] = Recent(limit=3)
    for number in range(3):
        cache[number] = str(number)
    assert cache.recent(0) == "0"
    cache[3] = "3"
    assert list(cache) == [2, 0, 3]
    assert cache.recent(1) is None
    twin = pickle.loads(pickle.dumps(cache))
    assert dict(twin) == dict(cache)


def test_classes_in_use_are_found_again_and_others_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpeft.passes.live.generated._recent", Recent(limit=2))

    def made(number: int) -> type[nn.Module]:
        return generated_class(Head, f"def forward(self, x):\n    return {number}\n")

    held, filename = made(0), made(0).forward.__code__.co_filename
    assert linecache.getline(filename, 2) == "    return 0\n"
    for number in range(1, 4):
        made(number)
    gc.collect()
    assert made(0) is held
    assert linecache.getline(filename, 2) == "    return 0\n"
    del held
    for number in range(1, 4):
        made(number)
    gc.collect()
    assert filename not in linecache.cache
