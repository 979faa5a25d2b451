"""A tiny Llama whose every slot is declared, and adapters in folders for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adapter_files import save
from tiny import logits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft

IDS = torch.arange(12).view(2, 6)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def folder(path: Path, seed: int, **config: Any) -> str:
    """A saved adapter with random values everywhere."""
    return save(base(), fxpeft.LoraConfig(**{"lora_alpha": 5, "target_modules": ["q_proj"], **config}), path, seed)


def output(model: nn.Module) -> Tensor:
    return logits(model, IDS)


def fresh(source: str) -> Tensor:
    model = base()
    fxpeft.load_adapter(model, source)
    return output(model)


def prepared(old: str, **settings: Any) -> LlamaForCausalLM:
    model = base()
    settings = {"targets": "all-linear", "modules_to_save": ["lm_head"], "bias": "all", **settings}
    fxpeft.prepare_hotswap(model, 8, **settings)
    fxpeft.load_adapter(model, old)
    return model
