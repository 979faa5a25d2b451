"""What starts from data (EVA, CorDA, LoRA-GA) have in common: the adapter that asks for one, and the model's mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fxpeft.adapters.state import Adapter, ModelState
from fxpeft.errors import AdapterError
from fxpeft.methods.lora import LoraConfig


def asking(state: ModelState, name: str, start: str) -> tuple[Adapter, LoraConfig]:
    """The adapter of that name and its config.

    Raises:
        AdapterError: its config has another start.
    """
    adapter = state.get(name)
    config = adapter.config
    if not isinstance(config, LoraConfig) or config.init_lora_weights != start:
        found = getattr(config, "init_lora_weights", config.peft_type)
        raise AdapterError(f"adapter {name!r}: expected a LoraConfig with init_lora_weights={start!r}, found {found!r}")
    return adapter, config


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation inside a ``with`` block; afterwards every module has its own mode again."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, own in before.items():
            module.training = own
