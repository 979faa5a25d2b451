"""LN tuning (https://arxiv.org/abs/2312.11420): the norms are trained as a whole, and nothing else.

An adapter brings copies of them, as others do by ``modules_to_save``; in PEFT's files they are called otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import SitePlan
from fxpeft.methods.defaults import LN_TARGETS, model_type_of
from fxpeft.methods.without_sites import NamesConfig, WithoutSites
from fxpeft.passes.targets.names import Endings

LAYERS = ".ln_tuning_layers."


@dataclass
class LNTuningConfig(NamesConfig):
    """Names and defaults of ``peft.LNTuningConfig``; ``target_modules``: the architecture's norms by default."""

    peft_type: ClassVar[str] = "LN_TUNING"


class LnTuning(WithoutSites[LNTuningConfig]):
    """Copies of modules alone: it has no sites."""

    name = "ln_tuning"
    peft_type = "LN_TUNING"
    config_class = LNTuningConfig

    def find(self, model: nn.Module, config: LNTuningConfig) -> tuple[LNTuningConfig, dict[str, SitePlan]]:
        if config.target_modules is not None:
            return config, {}
        model_type = model_type_of(model)
        if model_type not in LN_TARGETS:
            raise AdapterError(
                f"no default target_modules of LN tuning for {type(model).__name__} (model_type {model_type!r}): name "
                "the norms"
            )
        return config.changed(target_modules=LN_TARGETS[model_type]), {}

    def copied(self, config: LNTuningConfig, names: Mapping[str, object]) -> list[str]:
        return self.selected(config, names)

    def saved_key(self, config: LNTuningConfig, path: str, key: str) -> str:
        whole = any(True for _ in Endings(config.modules_to_save or ()).of(path))
        return f"{path}.{key}" if whole else f"{path}{LAYERS}{key}"

    def stored_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not any(LAYERS in key for key in tensors):
            return tensors
        return {key.replace(LAYERS, "."): tensor for key, tensor in tensors.items()}
