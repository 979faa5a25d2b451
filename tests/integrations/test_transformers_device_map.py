"""Bases that accelerate has spread: adapters and slots are where their modules run, also where weights are on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import logits, randomise, tiny_gpt2, tiny_llama, token_ids
from transformers import AutoModelForCausalLM

import fxpeft

MAPS: dict[str, dict[str, str]] = {
    "some on disk": {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "lm_head": "disk",
    },
    "most on disk": {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "disk",
        "lm_head": "disk",
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sites": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def spread(base: Path, folder: Path, device_map: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=str(folder / "offload"))


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("what", CONFIGS)
def test_offloaded_base(tmp_path: Path, where: str, what: str) -> None:
    whole = tiny_llama()
    whole.save_pretrained(tmp_path / "base")
    bare = logits(whole)
    model = spread(tmp_path / "base", tmp_path, MAPS[where])
    assert any(p.is_meta for p in model.parameters())
    for adapted in (model, whole):
        adapted.add_adapter(fxpeft.LoraConfig(r=4, lora_alpha=10, **CONFIGS[what]))
        # modules_to_save start from the base's own values, which are on disk for one of the two
        assert_close(logits(adapted), bare, terms=1, size=1.0)
        randomise(adapted.get_adapter_state_dict().values())
    assert {value.device.type for value in model.get_adapter_state_dict().values()} == {"cpu"}
    expected = logits(whole)
    assert_close(logits(model), expected)
    for adapted in (model, whole):
        adapted.train()(token_ids(), labels=token_ids()).loss.backward()
    theirs = dict(whole.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(torch.allclose(p.grad, theirs[name].grad, atol=1e-5) for name, p in trained.items())
    model.save_pretrained(tmp_path / "adapter")

    slots = spread(tmp_path / "base", tmp_path, MAPS[where])
    slots.enable_peft_hotswap(target_rank=8)
    for _ in range(2):
        slots.load_adapter(str(tmp_path / "adapter"), "default")
        assert_close(logits(slots), expected)
    slots.disable_adapters()
    assert_close(logits(slots), bare)
    slots.enable_adapters()
    fxpeft.remove(slots)
    assert_close(logits(slots), bare, terms=1, size=1.0)
    loaded = spread(tmp_path / "adapter", tmp_path, MAPS[where])
    assert_close(logits(loaded), expected)


def test_offloaded_biases(tmp_path: Path) -> None:
    whole = tiny_gpt2()
    whole.save_pretrained(tmp_path / "base")
    bare = logits(whole)
    device_map = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    device_map["transformer.h"] = "disk"
    model = spread(tmp_path / "base", tmp_path, device_map)
    for adapted in (model, whole):
        adapted.add_adapter(fxpeft.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"))
        assert_close(logits(adapted), bare, terms=1, size=1.0)
        randomise(adapted.get_adapter_state_dict().values())
    expected = logits(whole)
    assert_close(logits(model), expected)
    fxpeft.prepare_hotswap(model, max_rank=4)
    assert_close(logits(model), expected)
    model.disable_adapters()
    assert_close(logits(model), bare)


def test_one_device_for_all(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    model.add_adapter(fxpeft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), logits(tiny_llama()))
