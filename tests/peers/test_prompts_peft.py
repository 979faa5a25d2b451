"""Soft prompts against PEFT: outputs, tokens, losses, gradients and checkpoints both ways."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tiny import VOCABULARY, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    GenerationMixin,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxpeft

VIRTUAL = 5


@pytest.fixture(autouse=True)
def _peft_knows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT 0.21 go on calling the cache ``past_key_values``, which transformers 5.24 renamed ``cache``.

    Without this it raises for prefixes below a head and repeats its prompt in every step of generate.
    Its mathematics is not touched: forwards take the older name still, here their signatures and the
    inputs that generate prepares have it too.
    """
    if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return

    def signature(function: Any) -> inspect.Signature:
        found = inspect.signature(function)
        own = [p.replace(name="past_key_values") if n == "cache" else p for n, p in found.parameters.items()]
        return found.replace(parameters=own)

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = type(self.base_model).prepare_inputs_for_generation(self.base_model, *args, **kwargs)
        return {"past_key_values" if name == "cache" else name: value for name, value in made.items()}

    monkeypatch.setattr(peft.peft_model, "inspect", SimpleNamespace(signature=signature))
    for cls in (peft.PeftModelForCausalLM, peft.PeftModelForSeq2SeqLM):
        # a property of the class comes before what __init__ puts into the instance
        monkeypatch.setattr(
            cls, "base_model_prepare_inputs_for_generation",
            property(lambda self: lambda *a, **k: prepare(self, *a, **k), lambda self, value: None), raising=False,
        )  # fmt: skip


def tiny_qwen() -> Qwen3ForCausalLM:
    """Heads that are wider than the hidden size's share, and an output that is tied to the embeddings."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    """Three layers: PEFT lays a decoder's prefix out twice, so that which layer gets what depends on their number."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


CAUSAL = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen": tiny_qwen}
CONFIGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "prompt": (fxpeft.PromptTuningConfig, peft.PromptTuningConfig, {}),
    "prefix": (fxpeft.PrefixTuningConfig, peft.PrefixTuningConfig, {}),
    "projected prefix": (
        fxpeft.PrefixTuningConfig, peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 12},
    ),
    "mlp": (fxpeft.PromptEncoderConfig, peft.PromptEncoderConfig, {"encoder_hidden_size": 18}),
    "lstm": (
        fxpeft.PromptEncoderConfig, peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 14, "encoder_num_layers": 1},
    ),
}  # fmt: skip


def padded(batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    """Ids with a left-padded row."""
    ids = token_ids(batch, length)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model: PreTrainedModel, name: str, task: str = "CAUSAL_LM", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A fresh adapter of fxpeft and one of PEFT, of the same seed, on copies of a model."""
    ours, theirs, own = CONFIGS[name]
    theirs_config = theirs(task_type=task, num_virtual_tokens=VIRTUAL, **own, **options)
    torch.manual_seed(7)
    peer = peft.get_peft_model(copy.deepcopy(model), theirs_config)
    torch.manual_seed(7)
    fxpeft.add_adapter(model, ours(task_type=task, num_virtual_tokens=VIRTUAL, **own, **options))
    return model, peer.eval()


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
    inputs = padded()
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
    randomise((p for p in peer.parameters() if p.requires_grad), seed=3)
    peer.save_pretrained(tmp_path / "peft")
    inputs = padded()
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
    assert tensors[0].keys() == tensors[1].keys() == {"prompt_embeddings"}
    assert torch.equal(*(t["prompt_embeddings"] for t in tensors))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["prompt", "prefix", "mlp"])
@pytest.mark.parametrize("base", CAUSAL)
def test_generated_tokens(base: str, name: str, beams: int) -> None:
    """With a left-padded row; a static cache and none at all give the tokens of a dynamic one."""
    bare_model = CAUSAL[base]()
    for where, parameter in bare_model.named_parameters():  # as they are, tied models repeat one token
        parameter.data.mul_(8 if parameter.dim() == 2 else not where.endswith("bias"))
    model, peer = both(bare_model, name)
    for adapter in (model.adapters.default, peer.prompt_encoder.default):
        randomise(adapter.parameters(), seed=2, scale=0.8)
    inputs = padded()
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "num_beams": beams}
    with fxpeft.disabled(model):
        bare = model.generate(**inputs, **options)
    found = model.generate(**inputs, **options)
    assert torch.equal(found, quiet(peer, **inputs, **options))
    assert not torch.equal(found, bare)
    assert torch.equal(found, model.generate(**inputs, **options, use_cache=False))
    if base != "gpt2":  # which takes no static cache
        assert torch.equal(found, model.generate(**inputs, **options, cache_implementation="static"))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    """Prompts go to the encoder, prefixes to the decoder; losses, tokens and files are PEFT's."""
    bare_model = tiny_t5()
    for parameter in bare_model.parameters():
        parameter.data.mul_(2 if parameter.dim() == 2 else 1)
    model, peer = both(bare_model, name, "SEQ_2_SEQ_LM")
    for adapter in (model.adapters.default, peer.prompt_encoder.default):
        randomise(adapter.parameters(), seed=2, scale=0.8)
    inputs, labels = padded(), token_ids(3, 4)
    found, wanted = model(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert_close(found.logits, wanted.logits)
    assert_close(found.loss, wanted.loss)
    assert not torch.equal(found.logits, model(**inputs, labels=labels.flip(0)).logits)
    for options in ({}, {"num_beams": 2}):
        options = {"do_sample": False, "max_new_tokens": 5, **options}
        tokens = quiet(peer, **inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), tokens)
        ids, mask = inputs.values()
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), tokens)
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), tokens)
        with fxpeft.disabled(model):
            assert not torch.equal(model.generate(**inputs, **options), tokens)
    fxpeft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(peer.base_model), tmp_path / "ours").eval()
    assert_close(again(**inputs, labels=labels).logits, wanted.logits)
    peer.save_pretrained(tmp_path / "theirs")
    fxpeft.load_adapter(model, tmp_path / "theirs", "theirs")
    assert_close(model(**inputs, labels=labels).logits, wanted.logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier(name: str, tmp_path: Path) -> None:
    """The head is trained and saved with the prompt; an encoder takes a prefix below its head."""
    model, peer = both(tiny_bert(), name, "SEQ_CLS")
    inputs = padded()
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
        assert not torch.allclose(model(**inputs).logits, found.logits, atol=1e-4)
    randomise((p for p in peer.parameters() if p.requires_grad), seed=4)
    peer.save_pretrained(tmp_path / "theirs")
    fxpeft.load_adapter(model, tmp_path / "theirs", "theirs")
    fxpeft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = peer(**inputs).logits
        assert_close(model(**inputs).logits, wanted)
        assert_close(again(**inputs).logits, wanted)
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() >= {"prompt_embeddings", "base_model.classifier.weight"}


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


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 11, "b": 22, "c": 33}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
