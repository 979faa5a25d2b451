"""Adapters that start in all the ways there are, and away from their start; for both libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from tiny import tiny_gpt2, tiny_llama, token_ids
from torch import nn

import fxpeft
from fxpeft import LoraConfig

IDS = token_ids()
FROM_BASE = ["pissa", "pissa_niter_2", "olora"]
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"down_proj": 3},
        },
    ),
    "gpt2": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 6}, "alpha_pattern": {"c_attn": 3}},
    ),
}  # fmt: skip


def config(case: str, init: str, **values: Any) -> dict[str, Any]:
    """What both libraries take: ranks, alphas and a scale that is nowhere 1."""
    if init == "loftq":
        values["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 2}
        own = {**MODELS[case][1], "target_modules": [t for t in MODELS[case][1]["target_modules"] if "embed" not in t]}
    else:
        own = MODELS[case][1]
    return {"r": 4, "lora_alpha": 6, "init_lora_weights": init, **own, **values}


def adapted(case: str, init: str, **values: Any) -> Any:
    model = MODELS[case][0]()
    torch.manual_seed(7)
    fxpeft.add_adapter(model, LoraConfig(**config(case, init, **values)))
    return model


def trained(model: nn.Module, seed: int = 0) -> Any:
    """Moved far away from the start; a magnitude stays positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = 0.3 * torch.randn(p.shape, generator=generator)
                p.mul_(1 + noise.abs()) if "magnitude" in name else p.add_(noise)
    return model


def peft_twin(case: str, init: str, **values: Any) -> Any:
    model = peft.get_peft_model(MODELS[case][0](), peft.LoraConfig(**config(case, init, **values)))
    return model.eval()
