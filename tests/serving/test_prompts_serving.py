"""Soft prompts in prepared models: swaps, other adapters beside them, and what the slot refuses."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from prompt_cases import CONFIGS, METHODS, VIRTUAL, logits, prompted, saved
from safetensors.torch import load_file
from tiny import randomise, tiny_bert, tiny_llama
from transformers import LlamaForCausalLM

import fxpeft
from fxpeft import AdapterError, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from fxpeft.passes.live import Container


def serving(name: str = "prompt_tuning", virtual: int = VIRTUAL, **options: Any) -> Any:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, methods=(name,), num_virtual_tokens=virtual, **options)
    return model


def test_a_prepared_model_runs_bare_until_it_has_a_prompt(tmp_path: Path) -> None:
    model = serving()
    bare = logits(tiny_llama())
    assert torch.equal(logits(model), bare)
    fxpeft.load_adapter(model, saved(tmp_path))
    wanted = logits(prompted())
    assert torch.equal(logits(model), wanted)
    with fxpeft.disabled(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), wanted)
    fxpeft.save_adapter(model, tmp_path / "again")
    assert torch.equal(*(load_file(f / "adapter_model.safetensors")["prompt_embeddings"]
                         for f in (tmp_path, tmp_path / "again")))  # fmt: skip
    assert not any("slot" in key for key in model.state_dict())
    fxpeft.remove(model)
    assert type(model) is LlamaForCausalLM
    assert "slot" not in model._modules
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", CONFIGS)
def test_prepare_keeps_a_prompt_and_its_encoder(name: str) -> None:
    model = prompted(name)
    wanted, own = logits(model), {n: p.detach().clone() for n, p in model.adapters.default.named_parameters()}
    fxpeft.prepare_hotswap(model, methods=(METHODS[name],))
    assert "adapters" not in model._modules
    assert_close(logits(model), wanted, terms=1)
    fxpeft.release_hotswap(model)
    assert torch.equal(logits(model), wanted)
    found = dict(model.adapters.default.named_parameters())
    assert found.keys() == own.keys()
    assert all(torch.equal(found[n], own[n]) and found[n].requires_grad for n in own)


def test_prompts_and_lora_share_a_prepared_model(tmp_path: Path) -> None:
    lora = tiny_llama()
    fxpeft.add_adapter(lora, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    randomise(fxpeft.adapter_state_dict(lora).values(), seed=3)
    fxpeft.save_adapter(lora, tmp_path / "lora")
    soft = saved(tmp_path / "soft")
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, max_rank=4, methods=("lora", "prompt_tuning"), num_virtual_tokens=VIRTUAL)
    fxpeft.load_adapter(model, tmp_path / "lora", "low")
    assert_close(logits(model), logits(lora), terms=1)
    fxpeft.load_adapter(model, soft, "soft")
    assert_close(logits(model), logits(prompted()), terms=1)
    prompted(model=lora, adapter="soft")
    fxpeft.set_adapter(lora, ["default", "soft"])
    fxpeft.set_adapter(model, ["low", "soft"])
    assert_close(logits(model), logits(lora), terms=1)


def test_a_prompt_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    model = serving(modules_to_save=["lm_head"])
    fxpeft.load_adapter(model, saved(tmp_path / "good"))
    before = logits(model)
    longer = tiny_llama()
    fxpeft.add_adapter(longer, PromptTuningConfig(num_virtual_tokens=VIRTUAL + 1))
    fxpeft.save_adapter(longer, tmp_path / "longer")
    saved(tmp_path / "prefix", "prefix")
    fxpeft.save_adapter(prompted("prompt", modules_to_save=["model.norm"]), tmp_path / "norm")
    for folder, message in (
        ("longer", "num_virtual_tokens: the slot was declared for 4, found 5"),
        ("prefix", "the slot was declared for 'embeddings', found 'keys and values'"),
        ("norm", "model.norm: has no slot"),
    ):
        with pytest.raises(AdapterError, match=re.escape(message)):
            fxpeft.hotswap(model, tmp_path / folder)
        assert torch.equal(logits(model), before)
    fxpeft.load_adapter(model, tmp_path / "good", "other")
    with pytest.raises(AdapterError, match="only one prompt can be active"):
        fxpeft.set_adapter(model, ["default", "other"])
    assert torch.equal(logits(model), before)


def test_a_head_is_swapped_with_its_prompt(tmp_path: Path) -> None:
    model = prompted("prompt", modules_to_save=["lm_head"])
    randomise(model.lm_head.adapters.parameters(), seed=5)
    wanted = logits(model)
    fxpeft.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == {"prompt_embeddings", "base_model.lm_head.weight"}
    served = serving(modules_to_save=["lm_head"])
    fxpeft.load_adapter(served, tmp_path)
    assert_close(logits(served), wanted, terms=1)


def test_a_swap_between_two_calls_of_a_lock(tmp_path: Path) -> None:
    model = serving()
    fxpeft.load_adapter(model, saved(tmp_path))
    with fxpeft.hold(model), pytest.raises(RuntimeError, match="swap inside a forward"):
        fxpeft.hotswap(model, tmp_path)


def test_bert_takes_a_prefix_below_its_head(tmp_path: Path) -> None:
    model = tiny_bert()
    fxpeft.add_adapter(model, PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type="SEQ_CLS"))
    randomise(model.bert.adapters.parameters(), scale=0.6)
    wanted = logits(model)
    fxpeft.save_adapter(model, tmp_path)
    served = tiny_bert()
    fxpeft.prepare_hotswap(
        served, methods=("prefix_tuning",), num_virtual_tokens=VIRTUAL, modules_to_save=["classifier"]
    )
    fxpeft.load_adapter(served, tmp_path)
    assert_close(logits(served), wanted, terms=1)


DECLARATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"methods": ("p_tuning",)}, "p_tuning: expected num_virtual_tokens"),
    "both": (
        {"methods": ("prompt_tuning", "prefix_tuning"), "num_virtual_tokens": 4}, "declare one of the two",
    ),
    "no method": ({"num_virtual_tokens": 4}, "num_virtual_tokens: only with one of the methods"),
    "a bias": (
        {"methods": ("prompt_tuning",), "num_virtual_tokens": 4, "bias": "all"}, "bias: expected 'none'",
    ),
    "none": ({"methods": ("prompt_tuning",), "num_virtual_tokens": 0}, "num_virtual_tokens: expected a positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARATIONS)
def test_bad_declarations(case: str) -> None:
    options, message = DECLARATIONS[case]
    model = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        fxpeft.prepare_hotswap(model, **options)
    assert type(model) is LlamaForCausalLM
    assert not any(isinstance(m, Container) for m in model.modules())


def test_a_prompt_needs_its_declaration(tmp_path: Path) -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model)
    with pytest.raises(AdapterError, match=r"declare methods=\('prompt_tuning',\), num_virtual_tokens=4"):
        fxpeft.load_adapter(model, saved(tmp_path))
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_copies_of_a_prepared_model(tmp_path: Path) -> None:
    model = serving()
    fxpeft.load_adapter(model, saved(tmp_path))
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        fxpeft.hotswap(other, {"prompt_embeddings": torch.zeros(VIRTUAL, 32)})
        assert not torch.equal(logits(other), wanted)
        assert torch.equal(logits(model), wanted)
