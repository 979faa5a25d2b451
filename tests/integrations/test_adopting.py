"""PEFT's adapters taken over: the same outputs, active as before; and PEFT's layers are no place for slots."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import nn

import fxpeft
from fxpeft.errors import AdapterError

IDS = torch.arange(14).view(2, 7) % VOCABULARY


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def of_peft(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}, "modules_to_save": ["lm_head"],
    }  # fmt: skip
    model: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**{**settings, **changes}), "first")
    model.add_adapter("second", peft.LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "first" in name or "second" in name:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("start", [True, "pissa"])
def test_adapters_of_get_peft_model(start: Any) -> None:
    theirs = of_peft(init_lora_weights=start)
    expected = {}
    for name in ("second", "first"):
        theirs.set_adapter(name)
        expected[name] = logits(theirs)
    with theirs.disable_adapter():
        expected["off"] = logits(theirs)
    base = theirs.get_base_model()
    ours = fxpeft.adopt(theirs)
    assert ours is base
    assert not any(type(module).__module__.startswith("peft") for module in ours.modules())
    assert list(fxpeft.loaded_adapters(ours)) == ["first", "second"]
    assert fxpeft.active_adapters(ours) == ["first"]
    assert any(p.requires_grad for p in ours.parameters())
    fxpeft.prepare_hotswap(ours, 8, methods=["lora", "dora"])
    for name in ("first", "second"):
        fxpeft.set_adapter(ours, name)
        torch.testing.assert_close(logits(ours), expected[name], rtol=1e-5, atol=1e-5)
    fxpeft.disable_adapters(ours)
    torch.testing.assert_close(logits(ours), expected["off"], rtol=1e-5, atol=1e-5)


def test_layers_that_were_injected() -> None:
    model: Any = tiny_llama()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    expected = logits(model)
    assert fxpeft.adopt(model) is model
    assert "peft_config" not in vars(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    bare = logits(tiny_llama())
    fxpeft.remove(model)
    torch.testing.assert_close(logits(model), bare)


def test_what_cant_be_adopted_stays_as_it_was() -> None:
    theirs = of_peft()
    expected = logits(theirs)
    theirs.peft_config["first"].layer_replication = [(0, 1)]
    with pytest.raises(AdapterError, match="layer_replication"):
        fxpeft.adopt(theirs)
    theirs.peft_config["first"].layer_replication = None
    theirs.peft_config["first"].rank_pattern = {"q_proj": 3}
    with pytest.raises(AdapterError, match=r"q_proj.*expected \[3"):
        fxpeft.adopt(theirs)
    assert torch.equal(logits(theirs), expected)
    assert isinstance(theirs.get_base_model().model.layers[0].self_attn.q_proj, peft.tuners.lora.Linear)
    theirs.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter first"):
        fxpeft.adopt(theirs)
    with pytest.raises(AdapterError, match="found Linear without"):
        fxpeft.adopt(nn.Linear(2, 3))


def test_pefts_layers_are_no_targets() -> None:
    """Slots in its ``lora_A``, which the targets' names select too, would adapt PEFT's adapter."""
    theirs = of_peft()
    expected = logits(theirs)
    for change in (
        lambda: fxpeft.prepare_hotswap(theirs, 8),
        lambda: fxpeft.add_adapter(theirs, fxpeft.LoraConfig(target_modules=["q_proj"])),
        lambda: fxpeft.prepare_hotswap(theirs.get_base_model(), 8),
    ):
        with pytest.raises(AdapterError, match=r"is PEFT's, a .*fxpeft\.adopt"):
            change()
    assert torch.equal(logits(theirs), expected)


PROMPTS: dict[str, tuple[Any, str]] = {
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt_tuning"),
    "p-tuning": (
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=10), "p_tuning"
    ),
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix_tuning"),
    "cpt": (peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 9, 4], opt_projection_format_epsilon=9.0), "cpt"),
    "cartridge": (peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "cartridge"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    """They are of no layer: PEFT's model holds them around the base."""
    config, method = PROMPTS[name]
    base = tiny_llama()
    bare = logits(base)
    theirs: Any = peft.get_peft_model(base, config, "first").eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    expected = logits(theirs)
    assert expected.shape == bare.shape or expected.shape[1] == bare.shape[1] + 3
    ours = fxpeft.adopt(theirs)
    assert ours is base
    assert list(fxpeft.loaded_adapters(ours)) == ["first"]
    for prepared in (False, True):
        if prepared:
            fxpeft.prepare_hotswap(ours, 8, methods=[method], num_virtual_tokens=3)
        torch.testing.assert_close(logits(ours)[:, -7:], expected[:, -7:], rtol=1e-5, atol=1e-5)
    fxpeft.remove(ours)
    torch.testing.assert_close(logits(ours), bare)
