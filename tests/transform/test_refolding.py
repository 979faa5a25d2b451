"""A folded model: what it refuses, its copies, and other adapters folded in the first one's place."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from test_folding import LORA, add
from tiny import logits, tiny_llama
from torch import Tensor

import fxpeft
from fxpeft import AdapterError, LoraConfig


def test_what_a_folded_model_refuses() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.fold(model, "a")
    for call in (
        lambda: fxpeft.set_adapter(model, ["b", "a"]),
        lambda: fxpeft.set_scale(model, "a", 2),
        lambda: fxpeft.delete_adapter(model, "a"),
        lambda: fxpeft.disable_adapters(model),
        lambda: fxpeft.convert(model, "a"),
    ):
        with pytest.raises(AdapterError, match=r"'a' is folded into the base's weights.*unfold the model first"):
            call()
    with pytest.raises(AdapterError, match="a is folded already"):
        fxpeft.fold(model, "b")
    with pytest.raises(AdapterError, match="keep: expected"):
        fxpeft.fold(model, keep="originals")
    fxpeft.unfold(model)
    with pytest.raises(AdapterError, match="no adapter is folded"):
        fxpeft.unfold(model)
    fxpeft.disable_adapters(model)
    with pytest.raises(AdapterError, match="switched off"):
        fxpeft.fold(model)
    fxpeft.enable_adapters(model)
    fxpeft.set_adapter(model, [])
    with pytest.raises(AdapterError, match="no adapter is active; say which to fold: a, b"):
        fxpeft.fold(model)


def test_unfold_refuses_adapters_that_can_not_run_together() -> None:
    model = tiny_llama()
    for seed, name in enumerate("ab"):
        add(model, name, seed, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    fxpeft.fold(model, "a")
    fxpeft.set_adapter(model, "b")
    before = logits(model)
    with pytest.raises(AdapterError, match="each brings its own\n  lm_head: a and b"):
        fxpeft.unfold(model)
    assert torch.equal(logits(model), before)
    fxpeft.refold(model, "b")
    assert fxpeft.folded_adapters(model) == ["b"]
    fxpeft.unfold(model)
    assert torch.equal(model.state_dict()["lm_head.weight"], tiny_llama().lm_head.weight)  # its attribute is b's
    assert not torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "half"])
def test_a_copy_unfolds_on_its_own(way: str, tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, "a", 1)
    fxpeft.fold(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = copy.deepcopy(model).to(torch.bfloat16)
    folded = logits(model)
    fxpeft.remove(other)
    bare = tiny_llama() if way != "half" else tiny_llama().to(torch.bfloat16)
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in other.state_dict().items())
    assert torch.equal(logits(model), folded)


def test_refold_is_exact_however_often() -> None:
    model = tiny_llama()
    names = {"a": LoraConfig(**LORA), "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"])}
    names["c"] = LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj"], modules_to_save=["lm_head"])
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {"": logits(model)}
    for seed, (name, config) in enumerate(names.items()):
        add(model, name, seed, config)
        expected[name] = logits(model)
    places = [p.data_ptr() for n, p in model.named_parameters() if ".adapters." not in n]
    first: dict[str, Tensor] = {}
    for i in range(100):
        name = "abc "[i * 7 % 4].strip()
        fxpeft.refold(model, name or [])
        assert fxpeft.folded_adapters(model) == ([name] if name else [])
        assert fxpeft.active_adapters(model) == []
        if i < 8:
            assert_close(logits(model), expected[name])
            assert torch.equal(first.setdefault(name, logits(model)), logits(model))
    fxpeft.refold(model, ["a", "b"])
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == ["a", "b"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bare.items())
    assert places == [p.data_ptr() for n, p in model.named_parameters() if ".adapters." not in n]


def test_a_refold_that_fails_leaves_the_old_one() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2, LoraConfig(**LORA, lora_bias=True))
    fxpeft.refold(model, "a")
    before = logits(model)
    with pytest.raises(AdapterError, match="adds a bias and the base has none"):
        fxpeft.refold(model, "b")
    assert torch.equal(logits(model), before)
    assert fxpeft.folded_adapters(model) == ["a"]
    with torch._inductor.config.patch(freezing=True), pytest.raises(AdapterError, match="freezing"):
        fxpeft.refold(model, [])
    fxpeft.remove(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_refold_of_a_delta_and_of_tied_sites() -> None:
    model = tiny_llama()
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    add(model, "a", 1)
    add(model, "b", 2)
    running = logits(model)
    fxpeft.fold(model, "a", keep="delta")
    fxpeft.refold(model, "b")
    assert_close(logits(model), running)
    fxpeft.unfold(model)
    for key, value in bare.items():
        assert_close(model.state_dict()[key], value, terms=1, size=1.0)  # the update's


def test_forwards_of_other_threads_see_one_adapter_whole() -> None:
    """On a prepared model a fold is one swap under its lock."""
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.prepare_hotswap(model, 8)
    expected = []
    for name in ("a", "b"):
        fxpeft.set_adapter(model, name)
        expected.append(logits(model))
    seen: list[Tensor] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def forward() -> None:
        try:
            while not done.is_set():
                seen.append(logits(model))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    swaps = 0
    while swaps < 20 or (len(seen) < 4 and thread.is_alive()):  # a busy machine may give the thread few turns
        fxpeft.refold(model, "ab"[swaps % 2])
        fxpeft.unfold(model)
        swaps += 1
    done.set()
    thread.join()
    assert not failed
    assert len(seen) > 3
    assert all(any(torch.allclose(s, e, atol=1e-4) for e in expected) for s in seen)


def test_a_prompt_is_no_weight() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prompt")
    running = logits(model)
    with pytest.raises(AdapterError, match="prompt: a prompt adds tokens and changes no weight"):
        fxpeft.fold(model)
    with pytest.raises(AdapterError, match="a prompt adds tokens, which no LoRA does"):
        fxpeft.convert(model, "prompt")
    add(model, "a", 1)
    with pytest.raises(AdapterError, match="only LoRAs can be blended, found\n  prompt: prompt_tuning"):
        fxpeft.add_weighted_adapter(model, ["a", "prompt"], [1.0, 1.0], "c")
    fxpeft.fold(model)
    fxpeft.set_adapter(model, "prompt")
    assert float((logits(model) - running).abs().max()) > 0.01  # it runs on the folded base
    fxpeft.unfold(model)
    fxpeft.set_adapter(model, "prompt")
    assert torch.equal(logits(model), running)
