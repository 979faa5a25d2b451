"""Soft prompts where reports found them wrong: fields that PEFT lacks, a length that comes later, unlike layers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from closeness import assert_close
from prompt_peers import gemma4
from tiny import VOCABULARY, randomise, tiny_llama, token_ids
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

import fxpeft
from fxpeft import AdapterError, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

PAIRS = [
    (PromptTuningConfig, peft.PromptTuningConfig),
    (PrefixTuningConfig, peft.PrefixTuningConfig),
    (PromptEncoderConfig, peft.PromptEncoderConfig),
]


def both(model: Any, **options: Any) -> tuple[Any, Any]:
    """Prefixes of one seed, of fxpeft and PEFT, on copies of a model."""
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **options}
    torch.manual_seed(7)
    peer: Any = peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(**options)).eval()
    torch.manual_seed(7)
    fxpeft.add_adapter(model, PrefixTuningConfig(**options))
    return model, peer


def run(model: Any, **inputs: Any) -> Any:
    """PEFT says in every forward which layers got the prefix, and calls the cache by its older name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_prompt_has_no_field_that_selects(ours: Any, theirs: Any, field: str) -> None:
    for make in (theirs, ours):
        with pytest.raises(TypeError, match=field):
            make(num_virtual_tokens=5, **{field: [0]})


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_length_may_come_later(ours: Any, theirs: Any) -> None:
    config, model = ours(), tiny_llama()
    assert config.num_virtual_tokens is theirs().num_virtual_tokens is None
    with pytest.raises(AdapterError, match="num_virtual_tokens: expected the length of the prompt, found None"):
        fxpeft.add_adapter(model, config)
    assert type(model) is type(tiny_llama())
    config.num_virtual_tokens = 3
    fxpeft.add_adapter(model, config)
    assert model.adapters.default().shape[0] == 3


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_of_layers_that_are_not_alike(projection: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prefix_projection": projection}
    model, peer = both(gemma4(), **options)
    ids = token_ids(3, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs["attention_mask"][1, :2] = 0
    found, wanted = run(model, **inputs), run(peer, **inputs)
    assert_close(found.logits, wanted.logits)
    bare = run(gemma4(), **inputs)
    assert (found.logits - bare.logits).abs().max() > 1e-2
    found.loss.backward()
    wanted.loss.backward()
    own, theirs = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, peer))
    for ours, other in zip(own, theirs, strict=True):
        assert other.abs().max() > 0
        assert_close(ours, other)
    randomise((p for p in peer.parameters() if p.requires_grad), seed=3, scale=0.7)
    peer.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        wanted = run(peer, **inputs).logits
        model = gemma4()
        fxpeft.load_adapter(model, tmp_path / "peft")
        assert_close(run(model, **inputs).logits, wanted)
        fxpeft.save_adapter(model, tmp_path / "fxpeft")
        again = peft.PeftModel.from_pretrained(gemma4(), tmp_path / "fxpeft").eval()
        assert_close(run(again, **inputs).logits, wanted)


def test_generate_and_serve_layers_that_are_not_alike(tmp_path: Path) -> None:
    """Step by step with a cache that knows windows and shared layers gives the tokens of whole forwards."""
    model = gemma4()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)
    fxpeft.add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5))
    randomise(model.adapters.parameters(), seed=2, scale=0.8)
    fxpeft.save_adapter(model, tmp_path)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 0}  # past the window of 16
    ids = token_ids(2, 6)
    found, whole = model.generate(ids, **options), ids
    with torch.no_grad():
        for _ in range(14):
            whole = torch.cat((whole, model(whole).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, whole)
    with fxpeft.disabled(model):
        assert not torch.equal(found, model.generate(ids, **options))
    fxpeft.remove(model)
    fxpeft.prepare_hotswap(model, methods=("prefix_tuning",), num_virtual_tokens=5)
    fxpeft.load_adapter(model, tmp_path)
    assert torch.equal(model.generate(ids, **options), found)


def test_a_layer_that_a_prefix_would_leave_out_is_refused() -> None:
    """Gemma 4's largest: the wide layers have fewer heads than the narrow ones. PEFT gives those no prefix."""
    model = gemma4(num_global_key_value_heads=1, attention_k_eq_v=True, num_kv_shared_layers=0)
    if model.config.per_layer_config[1].num_key_value_heads != 1:
        pytest.skip("this transformers has no fewer heads in wide layers")
    with pytest.raises(AdapterError, match=r"holds 1 key-value heads of width 16 .* layers \[0, 2\] have more heads"):
        fxpeft.add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5))
    assert type(model) is transformers.Gemma4ForCausalLM


def test_deberta_takes_no_prefix_and_says_why() -> None:
    """Its attention keeps no keys and values between calls; PEFT refuses it too, when the forward runs."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=32,
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).eval()
    peer = peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="does not support past key values"):
        run(peer, input_ids=token_ids())
    with pytest.raises(AdapterError, match=r"DebertaV2.* takes no cache of keys and values, so no prefix"):
        fxpeft.add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"))
    assert type(model) is DebertaV2ForSequenceClassification
    fxpeft.add_adapter(model, PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"))
    assert model(token_ids()).logits.shape == (2, 2)
