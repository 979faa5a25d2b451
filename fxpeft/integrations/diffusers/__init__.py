"""A diffusers pipeline with fxpeft's adapters: functions on it, and its own methods after ``install``."""

from fxpeft.integrations.diffusers.pipeline import load_lora_weights, save_lora_weights, set_adapters
from fxpeft.integrations.diffusers.verbs import (
    delete_adapters,
    disable_lora,
    enable_lora,
    enable_lora_hotswap,
    fuse_lora,
    unfuse_lora,
    unload_lora_weights,
)

__all__ = [
    "delete_adapters", "disable_lora", "enable_lora", "enable_lora_hotswap", "fuse_lora", "load_lora_weights",
    "save_lora_weights", "set_adapters", "unfuse_lora", "unload_lora_weights",
]  # fmt: skip
