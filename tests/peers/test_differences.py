"""What differs from PEFT and stays so, each as the guide's list says it, with PEFT beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import logits, randomise, tiny_gpt2, tiny_llama
from torch import nn

import fxpeft
from fxpeft import AdapterError, LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
BIASED: dict[str, Any] = {"r": 3, "lora_alpha": 7, "bias": "all"}


def test_several_adapters_with_biases() -> None:
    """Each of the two computes what PEFT's one adapter does alone."""
    peer = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**BIASED, target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        peer.add_adapter("b", peft.LoraConfig(**BIASED, target_modules=["c_attn"]))
    model = tiny_gpt2()
    targets = {"a": "c_fc", "b": "c_attn"}
    for seed, (name, target) in enumerate(targets.items()):
        fxpeft.add_adapter(model, LoraConfig(**BIASED, target_modules=[target]), name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
    for seed, (name, target) in enumerate(targets.items()):
        alone: Any = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**BIASED, target_modules=[target])).eval()
        ours = fxpeft.adapter_state_dict(model, name)
        missing = peft.set_peft_model_state_dict(alone, ours)
        assert not missing.unexpected_keys
        fxpeft.set_adapter(model, name)
        assert_close(logits(model), logits(alone))
        assert (logits(model) - logits(tiny_gpt2())).abs().max() > 0.1, seed
    before = logits(model)
    with pytest.raises(AdapterError, match="can't be active together, each brings its own"):
        fxpeft.set_adapter(model, ["a", "b"])
    assert torch.equal(logits(model), before)
    fxpeft.remove(model)
    assert torch.equal(logits(model), logits(tiny_gpt2()))


def test_all_biases_with_a_targeted_parameter() -> None:
    """PEFT takes it, and trains the bias; of a module without one there is nothing to refuse here."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4, bias=False), nn.Linear(4, 3))

    fields: dict[str, Any] = {**BIASED, "target_modules": []}
    assert peft.get_peft_model(net(), peft.LoraConfig(**fields, target_parameters=["0.weight"]))
    model = net()
    with pytest.raises(AdapterError, match=r"0\.weight: .*one of its parameters is a target"):
        fxpeft.add_adapter(model, LoraConfig(**fields, target_parameters=["0.weight"]))
    assert all(type(m) in (nn.Linear, nn.Sequential) for m in model.modules())
    fxpeft.add_adapter(model, LoraConfig(**fields, target_parameters=["1.weight"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")} == {
        "0.adapters.default.bias", "2.adapters.default.bias",
    }  # fmt: skip


def test_one_sites_requires_grad() -> None:
    config: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"]}
    peer: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
    first = peer.base_model.model.model.layers[0].self_attn.q_proj
    first.enable_adapters(False)
    assert {p.requires_grad for n, p in peer.named_parameters() if "lora_" in n} == {False, True}
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(**config))
    own = model.model.layers[0].self_attn.q_proj.adapters.default
    own.requires_grad_(False)  # parameter by parameter, until adapters are chosen or switched; a block puts it back
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all("layers.1" in name for name in trained)
    with fxpeft.disabled(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    fxpeft.disable_adapters(model)
    fxpeft.enable_adapters(model)
    assert len([p for p in model.parameters() if p.requires_grad]) == 4


def test_a_frozen_adapter_stays_frozen(tmp_path: Path) -> None:
    peer: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    peer.save_pretrained(str(tmp_path))
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    model = tiny_llama()
    fxpeft.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for m in (peer, model) for p in m.parameters())
    with peer.disable_adapter(), fxpeft.disabled(model):
        pass
    assert any(p.requires_grad for p in peer.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    prompt: Any = peft.get_peft_model(
        tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    soft = tiny_llama()
    fxpeft.add_adapter(soft, fxpeft.PromptTuningConfig(num_virtual_tokens=3))
    with prompt.disable_adapter(), fxpeft.disabled(soft):
        assert any(p.requires_grad for p in prompt.parameters())
        assert not any(p.requires_grad for p in soft.parameters())
    assert soft.adapters.default.embedding.requires_grad


def test_ranks_of_a_state_dict() -> None:
    peer: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])).eval()
    randomise((p for n, p in peer.named_parameters() if "lora_" in n), seed=2)
    tensors = peft.get_peft_model_state_dict(peer)
    other = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=5, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(other, tensors)
    model = tiny_llama()
    fxpeft.inject(model, tensors, LoraConfig(r=5, lora_alpha=6, target_modules=["q_proj"]))
    assert_close(logits(model), logits(peer))
    peer.base_model.set_requires_grad("nobody")
    with pytest.raises(AdapterError, match="no adapter named 'nobody'"):
        fxpeft.set_requires_grad(model, "nobody")
