"""Soft prompts against PEFT: outputs, tokens, losses, gradients and checkpoints both ways."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from prompt_peers import CAUSAL, CONFIGS, NOT_CAUSAL, STORED, TASKS, VIRTUAL, both, padded, tiny_t5, tokenizer, trained
from prompt_peers import peft_knows_the_cache as peft_knows_the_cache
from safetensors.torch import load_file
from tiny import randomise, tiny_bert, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
)

import fxpeft


def quiet(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns about position ids in every step of generate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(*args, **kwargs)  # type: ignore[operator]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", CAUSAL)
def test_logits_loss_and_gradients(base: str, name: str) -> None:
    """A fresh adapter of the same seed is PEFT's, so that all of training starts from the same numbers."""
    model, peer = both(CAUSAL[base](), name)
    inputs = padded(name)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found, wanted = model(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert_close(found.logits, wanted.logits)
    assert_close(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert len(own) == len(theirs) > 0
    for (ours, grad), other in zip(own.items(), theirs.values(), strict=True):
        assert grad is not None, ours
        assert grad.abs().max() > 0, ours
        assert_close(grad, other)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", CAUSAL)
def test_checkpoints_both_ways(base: str, name: str, tmp_path: Path) -> None:
    model, peer = both(CAUSAL[base](), name)
    randomise(trained(peer), seed=3)
    peer.save_pretrained(tmp_path / "peft")
    inputs = padded(name)
    fxpeft.load_adapter(model, tmp_path / "peft", "theirs")
    with torch.no_grad():
        wanted = peer(**inputs).logits
        assert_close(model(**inputs).logits, wanted)
    fxpeft.save_adapter(model, tmp_path / "fxpeft")
    again = peft.PeftModel.from_pretrained(CAUSAL[base](), tmp_path / "fxpeft").eval()
    with torch.no_grad():
        assert_close(again(**inputs).logits, wanted)
    theirs, ours = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("peft", "fxpeft"))
    theirs["base_model_name_or_path"] = theirs["base_model_name_or_path"] or None  # "" before PEFT 0.21
    assert "peft_version" not in ours  # nor is a field that came after PEFT 0.17 and says nothing
    assert ours == {k: v for k, v in theirs.items() if k != "peft_version" and (k, v) != ("init_weights", None)}
    tensors = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "fxpeft")]
    keys = STORED | TASKS if name == "multitask" else STORED
    assert tensors[0].keys() == tensors[1].keys() == keys
    assert all(torch.equal(*(t[key] for t in tensors)) for key in keys)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["prompt", "prefix", "mlp", "multitask", "cpt", "cartridge"])
@pytest.mark.parametrize("base", CAUSAL)
def test_generated_tokens(base: str, name: str, beams: int) -> None:
    """With a left-padded row; a static cache and none at all give the tokens of a dynamic one."""
    bare_model = CAUSAL[base]()
    for where, parameter in bare_model.named_parameters():  # as they are, tied models repeat one token
        parameter.data.mul_(8 if parameter.dim() == 2 else not where.endswith("bias"))
    model, peer = both(bare_model, name)
    for adapter in (model.adapters.default, peer.prompt_encoder.default):
        randomise(trained(adapter), seed=2, scale=0.8)
    inputs = padded(name)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "num_beams": beams}
    with fxpeft.disabled(model):
        bare = model.generate(**padded(), **options)
    found = model.generate(**inputs, **options)
    assert torch.equal(found, quiet(peer, **inputs, **options))
    assert not torch.equal(found, bare)
    assert torch.equal(found, model.generate(**inputs, **options, use_cache=False))
    if base != "gpt2":  # which takes no static cache
        assert torch.equal(found, model.generate(**inputs, **options, cache_implementation="static"))


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    """Prompts go to the encoder, prefixes to the decoder; losses, tokens and files are PEFT's."""
    bare_model = tiny_t5()
    for parameter in bare_model.parameters():
        parameter.data.mul_(2 if parameter.dim() == 2 else 1)
    model, peer = both(bare_model, name, "SEQ_2_SEQ_LM")
    for adapter in (model.adapters.default, peer.prompt_encoder.default):
        randomise(trained(adapter), seed=2, scale=0.8)
    inputs, labels = padded(name), token_ids(3, 4)
    found, wanted = model(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert_close(found.logits, wanted.logits)
    assert_close(found.loss, wanted.loss)
    assert not torch.equal(found.logits, model(**inputs, labels=labels.flip(0)).logits)
    for options in ({}, {"num_beams": 2}):
        options = {"do_sample": False, "max_new_tokens": 5, **options}
        tokens = quiet(peer, **inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), tokens)
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        assert torch.equal(model.generate(inputs["input_ids"], **rest, **options), tokens)
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), tokens)
        with fxpeft.disabled(model):
            assert not torch.equal(model.generate(**padded(), **options), tokens)
    fxpeft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(peer.base_model), tmp_path / "ours").eval()
    assert_close(again(**inputs, labels=labels).logits, wanted.logits)
    peer.save_pretrained(tmp_path / "theirs")
    fxpeft.load_adapter(model, tmp_path / "theirs", "theirs")
    assert_close(model(**inputs, labels=labels).logits, wanted.logits)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_classifier(name: str, tmp_path: Path) -> None:
    """The head is trained and saved with the prompt; an encoder takes a prefix below its head."""
    model, peer = both(tiny_bert(), name, "SEQ_CLS")
    inputs = padded(name)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    inputs["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)
    labels = torch.tensor([0, 2, 1])
    found, wanted = model(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert_close(found.logits, wanted.logits)
    found.loss.backward()
    wanted.loss.backward()
    assert_close(
        model.classifier.adapters.default.weight.grad, peer.base_model.classifier.modules_to_save.default.weight.grad
    )
    with fxpeft.disabled(model), torch.no_grad():
        bare = model(**{key: value for key, value in inputs.items() if key != "task_ids"})
        assert not torch.allclose(bare.logits, found.logits, atol=1e-4)
    randomise(trained(peer), seed=4)
    peer.save_pretrained(tmp_path / "theirs")
    fxpeft.load_adapter(model, tmp_path / "theirs", "theirs")
    fxpeft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = peer(**inputs).logits
        assert_close(model(**inputs).logits, wanted)
        assert_close(again(**inputs).logits, wanted)
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() >= STORED | {"base_model.classifier.weight"}


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_other_tasks(task: str, name: str) -> None:
    classes = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}
    torch.manual_seed(1)
    config = copy.copy(tiny_bert().config)
    config.num_labels = 2
    model, peer = both(classes.get(task, BertModel)(config).eval(), name, task)
    inputs = padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    found, wanted = model(**inputs), peer(**inputs)
    tensors = [v for v in found.values() if isinstance(v, Tensor)]
    others = [v for v in wanted.values() if isinstance(v, Tensor)]
    for ours, theirs in zip(tensors, others, strict=True):
        assert_close(ours, theirs)


def test_labels_of_tokens_are_extended() -> None:
    """PEFT leaves them as long as the input, so that it can't train a prompt for this task."""
    torch.manual_seed(1)
    model = BertForTokenClassification(tiny_bert().config).eval()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=VIRTUAL))
    out = model(**padded(), labels=torch.zeros(3, 6, dtype=torch.long))
    expected = nn.functional.cross_entropy(out.logits[:, VIRTUAL:].flatten(0, 1), torch.zeros(18, dtype=torch.long))
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_last_token_of_a_decoder_that_classifies(name: str) -> None:
    torch.manual_seed(1)
    config = copy.copy(tiny_llama().config)
    config.pad_token_id, config.num_labels = 0, 3
    model, peer = both(LlamaForSequenceClassification(config).eval(), name, "SEQ_CLS")
    inputs = padded()
    assert_close(model(**inputs).logits, peer(**inputs).logits)


def test_a_sampled_and_a_written_prompt_begin_as_pefts(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    for options in (
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "b c a", "tokenizer_name_or_path": str(tmp_path)},
    ):
        model, peer = both(tiny_llama(), "prompt", **options)
        assert torch.equal(model.adapters.default.embedding, peer.prompt_encoder.default.embedding.weight)
        assert not torch.equal(model.adapters.default.embedding[0], model.adapters.default.embedding[1])
