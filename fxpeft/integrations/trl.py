"""TRL's trainers with fxpeft's adapters: what they ask of PEFT, answered for models that fxpeft has adapted.

``install`` sets the names below in the trainers' modules, those that are there and those that come; TRL itself is
never imported. A model or a config of PEFT's own goes to PEFT. The reference of DPO, KTO, RLOO and GRPO is then what
it is with PEFT: the adapters switched off where the trainer added the adapter from ``peft_config``, and a frozen copy
of the adapter, named ``ref``, where the model came with one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_peft_available

from fxpeft import adapters
from fxpeft.adapters.state import state_of
from fxpeft.integrations.transformers.model_state import adapters_of, train_parts
from fxpeft.methods.base import SiteAdapter
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.methods.prompts import PromptLearningConfig
from fxpeft.passes.live import Container, is_bound
from fxpeft.passes.slots.slot import Slot

UTILITIES = "trl.trainer.utils"
# the distillation trainer and the transfer of weights to vLLM look inside of PEFT's model, so they stay as they are
MODULES = (UTILITIES, *(f"trl.trainer.{name}_trainer" for name in ("sft", "reward", "dpo", "kto", "grpo", "rloo")))
DONE = "_fxpeft"  # in a module that has ours
WITHOUT_PEFT: dict[str, Any] = {  # what a module has of PEFT where that is not installed
    "peft": SimpleNamespace(__version__="0.21.2"),  # asked what PEFT's LoRA can do
    "LoraConfig": LoraConfig,
    "is_peft_available": lambda: True,
    "get_peft_model": None,  # called with configs of PEFT's own alone
    **dict.fromkeys(("PeftModel", "PeftConfig", "PrefixTuningConfig", "PromptLearningConfig", "BaseTunerLayer"), ()),
}


def replacements(names: Collection[str] = MODULES) -> Iterator[tuple[ModuleType, str, Any]]:
    """Module, name and value of all that has to be set in those of TRL's modules that are there and haven't got it."""
    for name in MODULES:
        module = sys.modules.get(name)
        if name not in (*names, UTILITIES) or module is None or DONE in vars(module):
            continue
        missing = {} if is_peft_available() else WITHOUT_PEFT
        own = {**vars(module), **missing}
        changed = {DONE: True, **missing}
        if name != UTILITIES:
            changed |= {key: (own[key], kind) for key, kind in KINDS.items() if key in own}
            changed |= {key: make(own[key]) for key, make in FUNCTIONS.items() if key in own}
        yield from ((module, key, value) for key, value in changed.items())


class _HasAdapter(type):
    def __instancecheck__(cls, module: object) -> bool:
        if not isinstance(module, nn.Module):
            return False
        own, slot = (module._modules.get(name) for name in ("adapters", "slot"))
        return isinstance(slot, Slot) or (
            isinstance(own, Container) and any(isinstance(part, SiteAdapter) for part in own.children())
        )


class Adapted(metaclass=_HasAdapter):
    """``isinstance(module, Adapted)``: whether an adapter changes a module, as PEFT's ``BaseTunerLayer``.

    A module that an adapter brings whole (``modules_to_save``) is none.
    """


# asked by isinstance alone, which takes tuples
KINDS: dict[str, type] = {
    "PeftConfig": AdapterConfig,
    "PromptLearningConfig": PromptLearningConfig,
    "BaseTunerLayer": Adapted,
}


def _is_peft_model(theirs: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(theirs)
    def is_peft_model(model: nn.Module) -> bool:
        return bool(adapters_of(model)) or theirs(model)

    return is_peft_model


def _get_peft_model(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def get_peft_model(model: nn.Module, peft_config: object, *, autocast_adapter_dtype: bool = True) -> nn.Module:
        if not isinstance(peft_config, AdapterConfig):
            return theirs(model, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)  # type: ignore[no-any-return]
        adapters.add_adapter(model, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        train_parts(state_of(model).get("default"))
        return model

    return get_peft_model


def _use_adapter(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def use_adapter(model: nn.Module, adapter_name: str | None) -> AbstractContextManager[None]:
        if not adapters_of(model):
            return theirs(model, adapter_name)  # type: ignore[no-any-return]
        return adapters.disabled(model) if adapter_name is None else adapters.active(model, adapter_name)

    return use_adapter


def _add_fused_lm_head(theirs: Callable[..., None]) -> Callable[..., None]:
    """The head goes below a prompt, which prepares the inputs of the model's forward, whatever that is."""

    @functools.wraps(theirs)
    def add_fused_lm_head(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with adapters.disabled(model) if adapters_of(model) and is_bound(model) else nullcontext():
            theirs(model, *args, **kwargs)

    return add_fused_lm_head


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "is_peft_model": _is_peft_model,
    "get_peft_model": _get_peft_model,
    "use_adapter": _use_adapter,
    "add_fused_lm_head": _add_fused_lm_head,
}
