"""An adapter that starts from a part of the base's weight, as a LoRA for the untouched base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import inits
from fxpeft.methods.data_starts import NAMES as DATA_STARTS
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError, attribute
from fxpeft.passes.live import base_weight


def has_to_be_plain(model: nn.Module, adapter: Adapter) -> bool:
    """Whether PEFT would not find the adapter's start again from the base and the file.

    ``pissa_niter_N`` starts at random, and PEFT's OLoRA decomposes a weight that is stored
    ``[in, out]`` (GPT-2's Conv1D) the wrong way round.
    """
    config = adapter.config
    if not isinstance(config, LoraConfig) or not inits.has_start(config.init_lora_weights):
        return False
    if config.init_lora_weights in DATA_STARTS:
        return any(bool(parts["lora_B0"].any()) for parts in adapter.current().sites.values() if "lora_B0" in parts)
    sites = [submodule(model, s) for s, parts in adapter.values.sites.items() if "lora_A0" in parts]
    random = inits.iterations(config.init_lora_weights) is not None
    return (random and bool(sites)) or (config.init_lora_weights == "olora" and any(map(_flipped, sites)))


def plain(adapter: Adapter) -> Adapter:
    """The same adapter with ``init_lora_weights=True``: ``B A - B0 A0`` is a LoRA of twice the rank.

    Its scales stay, since alpha is doubled with the rank (with rsLoRA: times the root of 2), and
    factors without a start are filled up with zeros. PEFT's ``subtract_mutated_init``, but also for
    DoRA, embeddings, and patterns with rsLoRA.

    Raises:
        AdapterError: no LoRA of the base computes what the adapter does.
    """
    config = adapter.config
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise AdapterError(f"adapter {adapter.name!r}: plain=True is for LoRA and DoRA, found {config.peft_type}")
    if config.init_lora_weights == "loftq":
        raise AdapterError(
            f"adapter {adapter.name!r} runs on a quantised weight of its own, which differs from the base's by more "
            "than its rank: there is no plain LoRA of it. Save it without plain=True"
        )
    none: dict[str, Any] = {"eva_config": None, "corda_config": None, "lora_ga_config": None}
    if not inits.has_start(config.init_lora_weights):
        same = replace(config, init_lora_weights=True, **none)
        return replace(adapter, plan=replace(adapter.plan, config=same))
    factor = 2**0.5 if config.use_rslora else 2
    doubled = replace(
        config,
        init_lora_weights=True,
        **none,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: factor * v for k, v in config.alpha_pattern.items()},
    )
    values = adapter.current()
    sites = {site: _doubled(parts) for site, parts in values.sites.items()}
    plans = {site: replace(plan, rank=2 * plan.rank) for site, plan in adapter.plan.sites.items()}
    plan = replace(adapter.plan, config=doubled, sites=plans)
    return Adapter(adapter.name, plan, replace(values, sites=sites), adapter.strength)


def _doubled(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    a, b = parts["lora_A"], parts["lora_B"]
    a0, b0 = parts.get("lora_A0", torch.zeros_like(a)), parts.get("lora_B0", torch.zeros_like(b))
    rest = {name: value for name, value in parts.items() if name not in ("lora_A0", "lora_B0")}
    return {**rest, "lora_A": torch.cat((a, a0)), "lora_B": torch.cat((b, -b0), 1)}


def _flipped(module: nn.Module) -> bool:
    try:
        return bool(base_weight(module).stride() != attribute(module, "weight").stride())
    except PassError:
        return False
