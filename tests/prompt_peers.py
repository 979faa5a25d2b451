"""Soft prompts of fxpeft and of PEFT, of one seed, on models of several families."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny import VOCABULARY, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxpeft

VIRTUAL = 5


@pytest.fixture(autouse=True)
def peft_knows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
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
    "multitask": (
        fxpeft.MultitaskPromptTuningConfig, peft.MultitaskPromptTuningConfig,
        {"num_tasks": 3, "num_ranks": 2, "num_transformer_submodules": 1},
    ),
    "cpt": (
        fxpeft.CPTConfig, peft.CPTConfig,
        {"cpt_token_ids": [3, 9, 4, 11, 7], "cpt_tokens_type_mask": [1, 2, 3, 4, 8], "opt_weighted_loss_type": "decay",
         "opt_loss_decay_factor": 0.7, "opt_projection_epsilon": 20.0, "opt_projection_format_epsilon": 7.0},
    ),
    "cartridge": (fxpeft.CartridgeConfig, peft.CartridgeConfig, {"num_frozen_tokens": 2}),
}  # fmt: skip
NOT_CAUSAL = [name for name in CONFIGS if name != "cpt"]
STORED = {"prompt_embeddings"}
TASKS = {"prefix_task_cols", "prefix_task_rows"}


def padded(name: str = "") -> dict[str, Tensor]:
    """Ids with a left-padded row, and what a method's forward takes beside them."""
    ids = token_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0
    more = {"task_ids": torch.tensor([2, 0, 1])} if name == "multitask" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def both(model: PreTrainedModel, name: str, task: str = "CAUSAL_LM", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A fresh adapter of fxpeft and one of PEFT, of the same seed, on copies of a model."""
    ours, theirs, own = CONFIGS[name]
    theirs_config = theirs(task_type=task, num_virtual_tokens=VIRTUAL, **own, **options)
    torch.manual_seed(7)
    peer = peft.get_peft_model(copy.deepcopy(model), theirs_config)
    torch.manual_seed(7)
    fxpeft.add_adapter(model, ours(task_type=task, num_virtual_tokens=VIRTUAL, **own, **options))
    return model, peer.eval()


KINDS = ["sliding_attention", "full_attention"]


def gemma4(**settings: Any) -> Any:
    """Four layers: narrow and wide heads in turn; the last reads the second one's keys and values."""
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip(f"Transformers {transformers.__version__} has no Gemma 4")
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=KINDS * 2, sliding_window=16, max_position_embeddings=64,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, eos_token_id=None,
        **{"global_head_dim": 16, "num_kv_shared_layers": 1, **settings},
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config).eval()


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 11, "b": 22, "c": 33}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
