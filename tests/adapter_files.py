"""Adapters whose every tensor is random, on models and in folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft


def spread(tensors: Mapping[str, Tensor], seed: int = 0, scale: float = 0.3) -> None:
    """Random values for an adapter's tensors; gains, magnitudes and bounds are around one."""
    randomise((value for value in tensors.values() if value.is_floating_point()), seed, scale)
    with torch.no_grad():
        for key, value in tensors.items():
            if "magnitude" in key or "ia3" in key or "lambda" in key or "boft_s" in key or "alpha" in key:
                value.add_(1)


def add(model: Any, config: Any, name: str = "default", seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Add a random adapter; its tensors, by their keys in a file."""
    fxpeft.add_adapter(model, config, name)
    tensors = fxpeft.adapter_state_dict(model, name)
    spread(tensors, seed, scale)
    return tensors


def save(model: nn.Module, config: Any, folder: Path, seed: int = 0) -> str:
    """A random adapter of this model, in a folder."""
    add(model, config, seed=seed)
    fxpeft.save_adapter(model, folder)
    return str(folder)


def save_each(build: Callable[[], Any], configs: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Each adapter of a model of its own, in a folder of its own, with its own random values."""
    return {name: save(build(), config, root / name, seed) for seed, (name, config) in enumerate(configs.items())}


def load_each(model: Any, folders: Mapping[str, str]) -> Any:
    """The model with all of them, the last one active."""
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    return model
