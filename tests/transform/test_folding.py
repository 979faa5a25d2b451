"""Folding: in place, all or nothing, exactly undone; what it refuses; and what else a folded model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import allowed, assert_close
from picture import assert_same, picture
from tiny import logits, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import nn

import fxpeft
from fxpeft import AdaLoraConfig, AdapterError, IA3Config, LoraConfig

IDS = token_ids()
EVERYTHING = ("lora", "lora_bias", "dora", "ia3", "adalora")
LORA: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 5},
    "alpha_pattern": {r"layers\.1\..*\.down_proj": 2},
}  # fmt: skip


def add(model: nn.Module, name: str, seed: int, config: fxpeft.methods.config.AdapterConfig | None = None) -> None:
    fxpeft.add_adapter(model, config or LoraConfig(**LORA), name)
    randomise(fxpeft.adapter_state_dict(model, name).values(), seed)


def test_fold_takes_the_adapter_out_of_the_forward() -> None:
    model, bare = tiny_llama(), tiny_llama()
    add(model, "a", 1)
    running = logits(model)
    fxpeft.fold(model)
    assert [type(m) for m in bare.modules()] == [type(m) for n, m in model.named_modules() if ".adapters" not in n]
    assert_close(logits(model), running)
    assert float((logits(bare) - running).abs().max()) > 0.1
    assert not any(p.requires_grad for p in model.parameters())
    fxpeft.unfold(model)
    assert torch.equal(logits(model), running)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".adapters." in n)


def test_remove_unfolds_and_restores_everything() -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    add(model, "a", 1, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    fxpeft.fold(model)
    fxpeft.remove(model)
    assert_same(before, picture(model, IDS))


MIXES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "two loras": (tiny_llama, {"a": LoraConfig(**LORA), "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"])}),
    "gains below": (
        tiny_bert,
        {
            "a": IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["query", "output.dense"], lora_bias=True),
        },
    ),
    "gains above": (
        tiny_bert,
        {
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["query", "output.dense"], lora_bias=True),
            "a": IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        },
    ),
    "dora above, a bias brought": (
        tiny_gpt2,
        {
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc"], bias="all"),
            "c": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["c_attn"]),
            "a": LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], use_dora=True),
        },
    ),
    "dora with dropout above": (
        tiny_llama,
        {
            "a": LoraConfig(**LORA),
            "b": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True, lora_dropout=0.5),
        },
    ),
    "a site in a module that another adapter brings": (
        tiny_bert,
        {
            "a": LoraConfig(r=2, lora_alpha=5, target_modules=["query"], modules_to_save=["pooler"]),
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["key", "pooler.dense"]),
        },
    ),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("keep", ["original", "delta"])
def test_several_fold_in_the_order_of_the_forward(mix: Any, keep: Any) -> None:
    model = mix[0]()
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, (name, config) in enumerate(mix[1].items()):
        add(model, name, seed, config)
    fxpeft.set_adapter(model, list(mix[1]))
    running = logits(model)
    fxpeft.fold(model, keep=keep)
    assert_close(logits(model), running)
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == list(mix[1])
    for key, value in model.state_dict().items():
        if key in bare and keep == "original":
            assert torch.equal(value, bare[key])
        elif key in bare:
            gain = any("gain" in n for n, m in MIXES.items() if m is mix)  # divided by again, and one may be near zero
            atol = 2e-4 * max(1.0, float(bare[key].abs().max())) if gain else allowed(bare[key], terms=1, size=1.0)
            torch.testing.assert_close(value, bare[key], rtol=0, atol=atol)
    assert_close(logits(model), running)


def test_folding_a_part_leaves_the_rest_on_top() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.set_adapter(model, ["a", "b"])
    running = logits(model)
    fxpeft.fold(model, "b")
    assert (fxpeft.active_adapters(model), fxpeft.folded_adapters(model)) == (["a"], ["b"])
    assert_close(logits(model), running)
    fxpeft.set_adapter(model, [])
    alone = logits(model)
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == ["b"]
    assert_close(logits(model), alone)


def test_a_gain_above_what_stays_is_refused() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2, IA3Config(target_modules=["v_proj", "k_proj"], feedforward_modules=[]))
    fxpeft.set_adapter(model, ["a", "b"])
    before = logits(model)
    with pytest.raises(AdapterError, match=r"v_proj: a comes before b"):
        fxpeft.fold(model, "b")
    assert torch.equal(logits(model), before)
    fxpeft.fold(model, "a")  # from below there is no question
    assert_close(logits(model), before)


def test_dora_reads_the_folded_base() -> None:
    """On top of a folded adapter, live and in slots: a DoRA's gain is one of the weights that are there."""
    outputs = []
    for slots in (False, True):
        model = tiny_llama()
        add(model, "dora", 2, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_dora=True))
        add(model, "a", 1)
        if slots:
            fxpeft.prepare_hotswap(model, 8, methods=EVERYTHING)
        fxpeft.fold(model, "a")
        fxpeft.set_adapter(model, "dora")
        outputs.append(logits(model))
        fxpeft.set_adapter(model, [])
        fxpeft.refold(model, [])
        fxpeft.set_adapter(model, "dora")
        outputs.append(logits(model))
    alone = tiny_llama()
    add(alone, "dora", 2, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_dora=True))
    assert_close(outputs[0], outputs[2])
    assert_close(outputs[1], logits(alone))
    assert_close(outputs[3], logits(alone))
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2


def test_slots_show_the_folded_base() -> None:
    """A prepared model has copies of the modules and biases that adapters may bring."""
    model = tiny_gpt2()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc"], bias="all", modules_to_save=["ln_f"])
    add(model, "a", 1, config)
    live = logits(model)
    fxpeft.prepare_hotswap(model, 4)
    fxpeft.fold(model)
    assert_close(logits(model), live)
    fxpeft.unfold(model)
    assert_close(logits(model), live)
    fxpeft.disable_adapters(model)
    assert torch.equal(logits(model), logits(tiny_gpt2()))


def test_strength_counts() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    fxpeft.set_scale(model, "a", -0.4)
    running = logits(model)
    fxpeft.fold(model)
    assert_close(logits(model), running)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_delta_drifts_by_rounding_only(dtype: torch.dtype, bound: float) -> None:
    model = tiny_llama(dtype)
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    add(model, "a", 1)
    changed = 0.0
    for _ in range(5):
        fxpeft.fold(model, keep="delta")
        assert not fxpeft.adapters.state.state_of(model).folded.originals
        folded = model.state_dict()
        changed = max(changed, *(float((folded[k] - v).abs().max()) for k, v in bare.items()))
        fxpeft.unfold(model)
    drift = max(float((model.state_dict()[k] - v).abs().max()) for k, v in bare.items())
    assert changed > 0.5
    assert 0 < drift < bound * changed, (drift, changed)


def test_delta_can_not_divide_by_zero() -> None:
    model = tiny_llama()
    add(model, "a", 1, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    next(iter(fxpeft.adapter_state_dict(model).values()))[3] = 0
    before = logits(model)
    with pytest.raises(AdapterError, match=r"g_out holds zeros.*keep='original'"):
        fxpeft.fold(model, keep="delta")
    fxpeft.fold(model)
    fxpeft.unfold(model)
    assert torch.equal(logits(model), before)


def test_for_good() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    running = logits(model)
    fxpeft.fold(model, keep=None)
    assert_close(logits(model), running)
    with pytest.raises(AdapterError, match="a was folded with keep=None, so nothing was kept"):
        fxpeft.unfold(model)
    with pytest.raises(AdapterError, match="add it twice; it stays there"):
        fxpeft.set_adapter(model, "a")
    with pytest.raises(AdapterError, match="add it twice"):
        fxpeft.refold(model, "a")
    add(model, "b", 2)
    on_top = logits(model)
    fxpeft.fold(model)
    assert fxpeft.folded_adapters(model) == ["a", "b"]
    fxpeft.unfold(model)
    assert torch.equal(logits(model), on_top)
    fxpeft.delete_adapter(model, "b")
    fxpeft.delete_adapter(model, "a")
    assert_close(logits(model), running)
    assert "_fxpeft" not in vars(model)


@pytest.mark.parametrize("slots", [False, True], ids=["live", "slots"])
def test_merge_and_unload_leaves_a_plain_model(slots: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    attributes = [sorted(vars(m)) for m in model.modules()]
    add(model, "unused", 3)
    add(model, "a", 1)
    add(model, "b", 2)
    if slots:
        fxpeft.prepare_hotswap(model, 16)
    fxpeft.fold(model, "a")
    fxpeft.set_adapter(model, "b")
    running = logits(model)
    assert fxpeft.merge_and_unload(model, ["a", "b"]) is model
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(p.requires_grad for p in model.parameters())
    assert_close(logits(model), running)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_merge_and_unload_refuses_before_anything_changed() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.fold(model, "a")
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match="no adapter named 'c'"):
        fxpeft.merge_and_unload(model, "c")
    assert_same(before, picture(model, IDS))
    assert fxpeft.folded_adapters(model) == ["a"]
