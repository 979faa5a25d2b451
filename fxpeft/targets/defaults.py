"""Targets that a config leaves to the model: the architecture's usual ones, else its attention's; all linear ones.

The usual ones are PEFT's tables (:mod:`fxpeft.methods.defaults`). A model of none of them is traced; see
:func:`fxpeft.targets.attention.attention_targets`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.defaults import OWN_TARGETS, TARGETS, model_type_of
from fxpeft.model.modules import Modules
from fxpeft.model.walk import embedding_layer
from fxpeft.targets.attention import attention_targets
from fxpeft.targets.saved import HEADS


def with_targets(config: AdapterConfig, modules: Modules) -> AdapterConfig:
    """A config with ``target_modules`` where it has none, or ``"all-linear"``.

    Raises:
        AdapterError: as :func:`default_targets`.
    """
    targets: list[str] | str
    if config.target_modules is None and getattr(config, "target_parameters", None):
        targets = TARGETS.get(model_type_of(modules.model) or "") or []
    elif config.target_modules is None:
        targets = default_targets(modules, method_of(config).name)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        targets = all_linear(modules, config.task_type)
    else:
        return config
    return config.changed(target_modules=targets)


def all_linear(modules: Modules, task_type: str | None) -> list[str]:
    """Every linear module but the output head, as PEFT's ``all-linear``, and but those that nothing calls."""
    model = modules.model
    head: Any = embedding_layer(model, "output") if isinstance(model, PreTrainedModel) else None
    if head is None and task_type == "SEQ_CLS":
        head = next((getattr(model, h) for h in HEADS["SEQ_CLS"] if hasattr(model, h)), None)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not modules.idle(name)
    ]


def default_targets(model: nn.Module | Modules, method: str = "lora") -> list[str] | str:
    """``target_modules`` for a model whose config names none.

    Raises:
        AdapterError: the architecture is unknown and no attention was found in its graph.
    """
    modules = Modules.of(model)
    model_type, architecture = model_type_of(modules.model), type(modules.model).__name__
    own = OWN_TARGETS.get(method, {})
    if method == "osf" and model_type not in own:
        return all_linear(modules, None)
    if model_type in own or (model_type in TARGETS and method != "ia3"):
        return own.get(model_type) or TARGETS[model_type]
    if method == "ia3":
        raise AdapterError(
            f"no default target_modules of IA3 for {architecture} (model_type {model_type!r}): name the keys, "
            "the values and the second feedforward layer, and the latter in feedforward_modules too"
        )
    found = attention_targets(modules)
    if not found:
        raise AdapterError(
            f"no default target_modules for {architecture} (model_type {model_type!r}): tracing it found no "
            "attention; name target_modules, or use 'all-linear'"
        )
    return found
