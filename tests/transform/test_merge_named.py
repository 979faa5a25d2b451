"""Merging adapters by name forgets all others, so those that are active can't stand in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import logits, randomise, tiny_llama

import fxpeft

GAIN = fxpeft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
LORA = fxpeft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
DORA = fxpeft.LoraConfig(r=2, lora_alpha=5, target_modules=["down_proj", "k_proj"], use_dora=True)


def loaded() -> Any:
    model = tiny_llama()
    for seed, (name, config) in enumerate({"gain": GAIN, "lora": LORA, "dora": DORA}.items()):
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed, scale=0.2)
    return model


@pytest.mark.parametrize(
    ("active", "merged", "slots"),
    [
        (["gain", "lora"], ["lora"], False),
        (["gain", "lora"], ["dora"], False),
        (["lora", "gain"], ["gain"], False),
        (["dora", "gain", "lora"], ["gain", "lora"], False),
        (["gain"], ["lora"], True),  # a slot takes no gain beside another adapter
        (["lora"], ["dora"], True),
    ],
)
def test_active_adapters_that_are_forgotten(active: list[str], merged: list[str], slots: bool) -> None:
    model = loaded()
    fxpeft.set_adapter(model, merged)
    expected = logits(model)
    if slots:
        fxpeft.prepare_hotswap(model, max_rank=8, methods=("lora", "ia3", "dora"))
    fxpeft.set_adapter(model, active)
    bare = tiny_llama()
    plain = fxpeft.merge_and_unload(model, merged)
    assert plain is model
    assert [type(m) for m in plain.modules()] == [type(m) for m in bare.modules()]
    assert plain.state_dict().keys() == bare.state_dict().keys()
    assert_close(logits(plain), expected)


def test_folding_still_refuses_what_would_change_the_rest() -> None:
    model = loaded()
    fxpeft.set_adapter(model, ["gain", "lora"])
    before = logits(model)
    with pytest.raises(fxpeft.AdapterError, match="gain comes before lora"):
        fxpeft.fold(model, "lora")
    assert torch.equal(logits(model), before)


def test_what_is_folded_below_stays() -> None:
    model = loaded()
    fxpeft.set_adapter(model, ["lora", "gain"])
    expected = logits(model)
    fxpeft.fold(model, "lora")
    fxpeft.set_adapter(model, ["dora", "gain"])
    assert_close(logits(fxpeft.merge_and_unload(model, "gain")), expected)


def test_an_error_changes_nothing() -> None:
    model = loaded()
    fxpeft.set_adapter(model, ["gain", "lora"])
    before = logits(model)
    with pytest.raises(fxpeft.AdapterError, match="no adapter named 'nobody'"):
        fxpeft.merge_and_unload(model, ["lora", "nobody"])
    assert fxpeft.active_adapters(model) == ["gain", "lora"]
    assert torch.equal(logits(model), before)
