"""Soft prompts of every sort on the tiny models, live and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor

import fxpeft
from fxpeft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

IDS = token_ids()
VIRTUAL = 4
CONFIGS: dict[str, Any] = {
    "prompt": lambda **v: PromptTuningConfig(num_virtual_tokens=VIRTUAL, **v),
    "prefix": lambda **v: PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **v),
    "projected": lambda **v: PrefixTuningConfig(num_virtual_tokens=VIRTUAL, prefix_projection=True, **v),
    "mlp": lambda **v: PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=9, **v),
    "lstm": lambda **v: PromptEncoderConfig(
        num_virtual_tokens=VIRTUAL, encoder_reparameterization_type="LSTM", encoder_hidden_size=9, encoder_dropout=0.5,
        **v,
    ),
    "task": lambda **v: MultitaskPromptTuningConfig(num_virtual_tokens=VIRTUAL, num_ranks=2, **v),
    "context": lambda **v: CPTConfig(cpt_token_ids=[3, 9, 4, 11], opt_projection_format_epsilon=30.0, **v),
    "cartridge": lambda **v: CartridgeConfig(num_virtual_tokens=VIRTUAL, **v),
}  # fmt: skip
METHODS = {
    "prompt": "prompt_tuning", "prefix": "prefix_tuning", "projected": "prefix_tuning", "mlp": "p_tuning",
    "lstm": "p_tuning", "task": "multitask_prompt_tuning", "context": "cpt", "cartridge": "cartridge",
}  # fmt: skip


def prompted(name: str = "prompt", model: Any = None, adapter: str = "default", **values: Any) -> Any:
    model = tiny_llama() if model is None else model
    fxpeft.add_adapter(model, CONFIGS[name](**values), adapter)
    randomise(model.adapters.get_submodule(adapter).parameters(), scale=0.6)
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(IDS, **inputs).logits  # type: ignore[no-any-return]


def saved(folder: Path, name: str = "prompt", **values: Any) -> Path:
    fxpeft.save_adapter(prompted(name, **values), folder)
    return folder
