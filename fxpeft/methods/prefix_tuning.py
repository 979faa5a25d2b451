"""Prefix tuning (https://arxiv.org/abs/2101.00190): trained keys and values before each layer's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from fxpeft.methods.base import Base, SitePlan
from fxpeft.methods.prefixes import PrefixMethod
from fxpeft.methods.prompts import PromptLearningConfig, PromptPlan


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Names and defaults of ``peft.PrefixTuningConfig``.

    Args:
        init_weights: ``"zero"``: keys and values begin at zero; ``None``: random.
        prefix_projection: they come out of a two-layer network while training.
        encoder_hidden_size: of that network; ``None``: ``token_dim``.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    since: ClassVar[Mapping[str, str]] = {"init_weights": "0.19.0"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("encoder_hidden_size")


class PrefixTuning(PrefixMethod[PrefixTuningConfig]):
    """The rows are trained as they are, or come out of a network."""

    name = "prefix_tuning"
    peft_type = "PREFIX_TUNING"
    config_class = PrefixTuningConfig

    def encoder(self, config: PrefixTuningConfig, plan: PromptPlan) -> nn.Module | None:
        if not config.prefix_projection:
            return None
        width = self.embedding_width(config, plan)
        hidden = config.encoder_hidden_size or width
        return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, plan.width))

    def embedding_width(self, config: PrefixTuningConfig, plan: PromptPlan) -> int:
        return plan.width // (2 * plan.layers) if config.prefix_projection else plan.width

    def initialise(
        self, config: PrefixTuningConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base
    ) -> None:
        if config.init_weights != "zero":
            return
        last = [name for name in parameters if name.startswith("encoder.2.")] or ["embedding"]
        for name in last:
            parameters[name].zero_()

    def resolved(self, model: PreTrainedModel, config: PrefixTuningConfig) -> PrefixTuningConfig:
        resolved = super().resolved(model, config)
        resolved.encoder_hidden_size = resolved.encoder_hidden_size or resolved.token_dim
        return resolved
