"""What a soft prompt refuses: configs, models without keys and values, files that don't fit."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from prompt_cases import CONFIGS, IDS, logits, prompted, saved
from safetensors.torch import load_file, save_file
from tiny import conv_net, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

import fxpeft
from fxpeft import AdapterError, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

BAD = {
    "no tokens": (lambda: PrefixTuningConfig(num_virtual_tokens=0), "num_virtual_tokens: expected a positive"),
    "a word": (lambda: PromptTuningConfig(num_virtual_tokens="5"), "num_virtual_tokens: expected int"),
    "init": (lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="ZERO"), "prompt_tuning_init"),
    "no tokenizer": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
        "tokenizer_name_or_path: prompt_tuning_init='TEXT' needs it",
    ),
    "no text": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", tokenizer_name_or_path="a"),
        "prompt_tuning_init_text: prompt_tuning_init='TEXT' needs it",
    ),
    "tokenizer options": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, tokenizer_kwargs={"a": 1}), "tokenizer_kwargs: only for",
    ),
    "dropout": (lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_dropout=1.0), "encoder_dropout"),
    "encoder": (
        lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_reparameterization_type="GRU"),
        "encoder_reparameterization_type",
    ),
    "submodules": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, num_transformer_submodules=3), "num_transformer_submodules",
    ),
    "zero layers": (lambda: PrefixTuningConfig(num_virtual_tokens=5, num_layers=0), "num_layers: expected a positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(AdapterError, match=message):
        make()


def test_an_ignored_number_of_layers_is_said() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers is ignored for the MLP"):
        PromptEncoderConfig(num_virtual_tokens=5, encoder_num_layers=3)


def mamba() -> MambaForCausalLM:
    """Weights large enough that what came before a token shows in its logits."""
    model = MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32)
    )
    for parameter in model.backbone.layers.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    return model


def xlm() -> XLMWithLMHeadModel:
    """Its forward has an argument ``cache`` in all versions of transformers, with a meaning of its own."""
    return XLMWithLMHeadModel(XLMConfig(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2))


def rwkv() -> RwkvForCausalLM:
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32)
    )


def split() -> LlamaForCausalLM:
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1, "model.norm": "cpu"}
    return model


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "no transformers model": (conv_net, CONFIGS["prompt"](), "expected a transformers model, found ConvNet"),
    "other width": (tiny_llama, CONFIGS["prompt"](token_dim=24), "token_dim: expected 32, .* found 24"),
    "other heads": (tiny_gpt2, CONFIGS["prefix"](num_attention_heads=3), "num_attention_heads: expected 4.* found 3"),
    "other layers": (tiny_llama, CONFIGS["prefix"](num_layers=7), "num_layers: expected 2.* found 7"),
    "no encoder": (tiny_llama, CONFIGS["prompt"](task_type="SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM doesn't fit LlamaFor"),
    "two submodules": (tiny_llama, CONFIGS["prompt"](num_transformer_submodules=2), "expected 1 for a model without"),
    "no keys": (mamba, CONFIGS["prefix"](), "MambaForCausalLM has layers without keys and values"),
    "no cache": (xlm, CONFIGS["prefix"](), "XLMWithLMHeadModel.forward takes no cache of keys and values"),
    "several devices": (split, CONFIGS["prefix"](), "split over 2 devices"),
    "no such module": (tiny_llama, CONFIGS["prompt"](modules_to_save=["hed"]), "modules_to_save.*\n.*hed"),
    "no tokenizer": (
        tiny_llama,
        CONFIGS["prompt"](
            prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="/there/is/none"
        ),
        "tokenizer_name_or_path: /there/is/none",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_models_that_take_no_such_prompt(case: str) -> None:
    make, config, message = MISFITS[case]
    model = make()
    cls, modules = type(model), [n for n, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, config)
    assert type(model) is cls
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_generate_without_keys_and_values() -> None:
    """RWKV's state is a list, which doesn't tell whether the prompt is in it."""
    model = prompted(model=rwkv().eval(), num_attention_heads=1)
    with pytest.raises(AdapterError, match="RwkvForCausalLM keeps no cache of its past"):
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    with torch.no_grad():
        assert torch.equal(found[:, -1], model(found[:, :-1]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_from_a_state(beams: int) -> None:
    """A state-space model's cache has no length; with it or without, padded rows and all, tokens are the same."""
    model = prompted(model=mamba().eval(), num_attention_heads=1)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0

    def generated(**options: Any) -> tuple[Tensor, Tensor]:
        found = model.generate(
            IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=beams,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return found.sequences, torch.stack(found.logits)

    (tokens, scores), (others, wanted) = generated(), generated(use_cache=False)
    assert torch.equal(tokens, others)
    assert_close(scores, wanted)
    with fxpeft.disabled(model):
        assert not torch.allclose(generated()[1][0], scores[0], atol=1e-3)


def test_a_loop_of_ones_own_from_a_state() -> None:
    model = prompted(model=mamba().eval(), num_attention_heads=1)
    name = "cache" if "cache" in inspect.signature(MambaForCausalLM.forward).parameters else "cache_params"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(IDS[:, :4], **{name: cache}, use_cache=True).logits[:, -4:]]
        parts += [model(IDS[:, i : i + 1], **{name: cache}, use_cache=True).logits for i in (4, 5)]
    assert_close(torch.cat(parts, 1), logits(model)[:, -6:])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    model = tiny_llama()
    for changed, message in (
        ({"prompt_embeddings": torch.ones(5, 32)}, r"prompt_embeddings: expected \[4, 32\], found \[5, 32\]"),
        ({"prompt": torch.ones(4, 32)}, r"doesn't fill:\n  prompt_embeddings \[4, 32\]"),
        ({**tensors, "more": torch.ones(1)}, r"no place in the model:\n  more \[1\]"),
        ({"prompt_embeddings": torch.full((4, 32), float("nan"))}, "expected finite values"),
    ):
        save_file(changed, weights)
        with pytest.raises(fxpeft.CheckpointError, match=message):
            fxpeft.load_adapter(model, folder, check_finite=True)
        assert type(model) is LlamaForCausalLM
    save_file(tensors, weights)
    with pytest.raises(AdapterError, match="is it a prompt of another base model"):
        fxpeft.load_adapter(tiny_gpt2(), folder)
    prefix = saved(tmp_path / "two", "prefix")
    with pytest.raises(AdapterError, match="is it a prefix of another base model"):
        fxpeft.load_adapter(tiny_gpt2(), prefix)
