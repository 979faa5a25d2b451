"""``print(model)`` says which adapters a site has, of which shapes and scale, and which are off."""

from __future__ import annotations

import pytest
import torch
from tiny import conv_net, randomise, tiny_gpt2, tiny_llama

import fxpeft
from fxpeft import IA3Config, LoraConfig, PromptTuningConfig


def test_a_sites_adapters() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.1), "a")
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["k_proj", "q_proj"], use_dora=True), "b")
    fxpeft.add_adapter(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "c")
    fxpeft.set_adapter(model, ["a", "c"])
    fxpeft.set_scale(model, "a", 0.5)
    attention = model.model.layers[1].self_attn
    assert repr(attention.q_proj) == (
        "AdaptedLinear(\n  in_features=32, out_features=32, bias=False\n  (adapters): Container(\n"
        "    (a): SiteAdapter(\n      lora_A=(3, 32), lora_B=(32, 3), scale=1.333\n"
        "      (dropout): Dropout(p=0.1, inplace=False)\n    )\n"
        "    (b): SiteAdapter(lora_A=(2, 32), lora_B=(32, 2), lora_magnitude_vector=(32,), scale=4, off)\n  )\n)"
    )
    assert "(c): SiteAdapter(ia3_l=(16, 1))" in repr(attention.k_proj)
    with fxpeft.disabled(model):
        assert repr(attention.k_proj).count(", off)") == 2
    fxpeft.delete_adapter(model, "c")
    fxpeft.delete_adapter(model, "b")
    fxpeft.prepare_hotswap(model, 8)
    assert "(slot): Slot(max_rank=8, rank=3)" in repr(attention.q_proj)
    fxpeft.remove(model)
    assert repr(model) == repr(tiny_llama())


def test_a_site_whose_class_has_a_text_of_its_own() -> None:
    """GPT-2's Conv1D, which prints no children, and convolutions."""
    model = tiny_gpt2()
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=6, target_modules=["c_fc"]))
    assert repr(model.transformer.h[0].mlp.c_fc) == (
        "Conv1D(nf=36, nx=24) (\n  (adapters): Container(\n"
        "    (default): SiteAdapter(lora_A=(3, 24), lora_B=(36, 3), scale=2)\n  )\n)"
    )
    fxpeft.remove(model)
    assert repr(model.transformer.h[0].mlp.c_fc) == "Conv1D(nf=36, nx=24)"
    net = conv_net()
    fxpeft.add_adapter(net, LoraConfig(r=2, target_modules=["grouped"]))
    assert "lora_A=(2, 6, 3, 3), lora_B=(4, 1, 1, 1)" in repr(net.grouped)


def test_a_prompt_and_a_parameter() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, PromptTuningConfig(num_virtual_tokens=5))
    assert "(default): PromptAdapter(virtual_tokens=5, embedding=(5, 32))" in repr(model)
    fxpeft.set_adapter(model, [])
    assert "virtual_tokens=5, embedding=(5, 32), off)" in repr(model)
    fxpeft.remove(model)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["up_proj.weight"])
    fxpeft.add_adapter(model, config)
    shown = repr(model.model.layers[0].mlp.up_proj)
    assert "(weight): SiteAdapter(lora_A=(2, 32), lora_B=(48, 2), scale=1)" in shown


@pytest.mark.parametrize("prepared", [False, True])
def test_what_is_printed_changes_nothing(prepared: bool) -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    if prepared:
        fxpeft.prepare_hotswap(model, 4)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        repr(model)
        assert torch.equal(model(ids).logits, before)
