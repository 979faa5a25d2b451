"""Default targets where a config names none: the architecture's usual ones, else its attention's.

The table states which modules PEFT 0.21 adapts by default
(``TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING``), so that a config without targets means the
same in both libraries. Any other model is traced; see :func:`fxpeft.targets.attention.attention_targets`.
"""

from __future__ import annotations

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.methods.defaults import ADALORA_TARGETS, IA3_TARGETS, TARGETS, _model_type
from fxpeft.targets.attention import attention_targets


def usual_targets(model: nn.Module) -> list[str] | str | None:
    """LoRA's ``target_modules`` for an architecture of PEFT's table, ``None`` for another."""
    return TARGETS.get(_model_type(model) or "")


def default_targets(model: nn.Module, method: str = "lora") -> list[str] | str:
    """``target_modules`` for a model whose config names none.

    Raises:
        AdapterError: the architecture is unknown and no attention was found in its graph.
    """
    model_type = _model_type(model)
    own = {"adalora": ADALORA_TARGETS, "ia3": IA3_TARGETS}.get(method, {})
    if model_type in own or (model_type in TARGETS and method != "ia3"):
        return own.get(model_type) or TARGETS[model_type]
    if method == "ia3":
        raise AdapterError(
            f"no default target_modules of IA3 for {type(model).__name__} (model_type {model_type!r}): name the keys, "
            "the values and the second feedforward layer, and the latter in feedforward_modules too"
        )
    found = attention_targets(model)
    if not found:
        raise AdapterError(
            f"no default target_modules for {type(model).__name__} (model_type {model_type!r}): tracing it found no "
            "attention; name target_modules, or use 'all-linear'"
        )
    return found
