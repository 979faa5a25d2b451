"""AdaLoRA's budget: which ranks stay on while an adapter trains (https://arxiv.org/abs/2303.10512, section 3.3)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError
from fxpeft.methods.adalora import AdaLoraConfig
from fxpeft.model.walk import full_tensor
from fxpeft.model.wrappers import unwrap

NAMES = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """Takes ranks away from an AdaLoRA adapter, the least important first, as its config's schedule says.

    Importance is PEFT's: smoothed ``|weight * gradient|`` times its smoothed variation, of a singular
    value, plus the means of its two singular vectors.

    Args:
        name: the adapter; the only AdaLoRA one by default.

    Raises:
        AdapterError: no such adapter, several, or one that isn't trained.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.model = unwrap(model)
        found = [n for n, a in state_of(model).adapters.items() if isinstance(a.config, AdaLoraConfig)]
        if name is None and len(found) != 1:
            raise AdapterError(f"expected one AdaLoRA adapter, found {found}; say which one")
        self.name = name or found[0]
        if self.name not in found:
            raise AdapterError(f"{self.name!r} is no AdaLoRA adapter; those are {found}")
        if not self._adapter().parts or self._config().inference_mode:
            raise AdapterError(f"adapter {self.name!r} isn't trained here, so there are no ranks to allocate")
        self.sensitivity: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}
        ranks = [len(parts["lora_E"]) for parts in self._parameters().values()]
        self.initial, self.target = sum(ranks), self._config().target_r * len(ranks)

    def _adapter(self) -> Adapter:
        return state_of(self.model).get(self.name)

    def _config(self) -> AdaLoraConfig:
        config = self._adapter().config
        assert isinstance(config, AdaLoraConfig)
        return config

    def _parameters(self) -> dict[str, dict[str, Tensor]]:
        adapter = self._adapter()
        return {site: {n: getattr(adapter.parts[site], n) for n in NAMES} for site in adapter.values.sites}

    def budget(self, step: int) -> int:
        """How many ranks all sites together may have at a step: all, then fewer (a cubic), then the target."""
        config = self._config()
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.initial
        if step > end:
            return self.target
        left = 1 - (step - config.tinit) / (end - config.tinit)
        return int((self.initial - self.target) * left**3 + self.target)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Do what a step asks for; call it after ``optimizer.step()``, while the gradients are there.

        The ranks that are off stand in the adapter's config as ``rank_pattern``.
        """
        config = self._config()
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        if step > end:
            self._switch_off(config.rank_pattern or {})
            return
        if step < end:
            self._observe()
        if step == end or (step > config.tinit and step % config.deltaT == 0):
            config.rank_pattern = self._select(self.budget(step))
            self._switch_off(config.rank_pattern)

    def _observe(self) -> None:
        beta1, beta2 = self._config().beta1, self._config().beta2
        for site, parts in self._parameters().items():
            for name, p in parts.items():
                if p.grad is None:
                    raise AdapterError(f"{site}.{name} has no gradient: call update() before zero_grad()")
                now, key = (p * p.grad).abs(), (site, name)
                smooth = beta1 * self.sensitivity.get(key, torch.zeros_like(p)) + (1 - beta1) * now
                change = (now - smooth).abs()
                self.sensitivity[key] = smooth
                self.uncertainty[key] = beta2 * self.uncertainty.get(key, torch.zeros_like(p)) + (1 - beta2) * change

    def _select(self, budget: int) -> dict[str, list[bool]]:
        scores = {}
        for site in self._parameters():
            a, b, e = (full_tensor(self.sensitivity[site, n] * self.uncertainty[site, n]) for n in NAMES)
            scores[site] = e.flatten() + a.mean(1) + b.mean(0)
        off = self.initial - budget
        limit = torch.cat(list(scores.values())).kthvalue(off).values if off > 0 else -torch.inf
        return {f"{site}.lora_E": (score > limit).tolist() for site, score in scores.items()}

    def _switch_off(self, pattern: dict[str, list[bool]]) -> None:
        for site, parts in self._parameters().items():
            on = pattern.get(f"{site}.lora_E")
            if on is not None:
                mask = torch.tensor(on, device=parts["lora_E"].device).unsqueeze(1)
                _local(parts["lora_E"]).masked_fill_(~_local(_parted(mask, parts["lora_E"])), 0.0)


def _parted(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, parted among them as another one is."""
    if not hasattr(like, "placements"):
        return tensor
    tensors: Any = importlib.import_module("torch.distributed.tensor")
    parted: Tensor = tensors.distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return parted


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class AdaLoraCallback(TrainerCallback):
    """Drives a :class:`RankAllocator` from a Trainer, which never does it by itself.

    ``Trainer(..., callbacks=[AdaLoraCallback(model)])``. A config's ``total_step`` should be the
    number of optimiser steps of the training.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self.allocator = RankAllocator(model, name)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimiser's step, before the gradients are zeroed."""
        self.allocator.update(state.global_step)
