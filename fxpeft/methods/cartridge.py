"""Cartridges (https://arxiv.org/abs/2506.06266): a prefix of keys and values that is trained as it is.

The first tokens may stay as they began: models attend to them whatever they hold, and training goes wrong where they
change. :mod:`fxpeft.adapters.kv_prefix` begins with a text's own keys and values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SitePlan
from fxpeft.methods.prefixes import PrefixMethod
from fxpeft.methods.prompts import PromptAdapter, PromptLearningConfig, PromptPlan


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Names and defaults of ``peft.CartridgeConfig``.

    Args:
        num_frozen_tokens: how many of the first virtual tokens are not trained.
    """

    num_frozen_tokens: int = 1

    peft_type: ClassVar[str] = "CARTRIDGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_frozen()

    def check_frozen(self) -> None:
        """Refuse more frozen tokens than there are."""
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            wanted = "0 or more" if most is None else f"0 to {most}, the number of virtual tokens"
            raise AdapterError(f"num_frozen_tokens: expected {wanted}, found {self.num_frozen_tokens}")


class CartridgeAdapter(PromptAdapter):
    """A cartridge in training: ``frozen`` tokens, where there are such, before the ``embedding`` that is trained."""

    def forward(self) -> Tensor:
        """The prompt, ``[rows, width]``."""
        frozen: Tensor | None = getattr(self, "frozen", None)
        return self.embedding if frozen is None else torch.cat((frozen, self.embedding))


class Cartridge(PrefixMethod[CartridgeConfig]):
    """In files one tensor, frozen tokens and trained ones."""

    name = "cartridge"
    peft_type = "CARTRIDGE"
    config_class = CartridgeConfig

    def check(self, model: PreTrainedModel, config: CartridgeConfig) -> None:
        super().check(model, config)
        config.check_frozen()  # the length may have come later

    def fresh(
        self, config: CartridgeConfig, plan: SitePlan, base: Base, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        shapes = self.shapes(config, plan)  # drawn one after the other, as PEFT does
        return {name: torch.empty(shape, dtype=torch.float32).normal_().to(device) for name, shape in shapes.items()}

    def part(
        self, config: CartridgeConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> CartridgeAdapter:
        return CartridgeAdapter(plan, parameters, frozen=self.untrained(config))

    def shapes(self, config: CartridgeConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, PromptPlan)
        frozen = config.num_frozen_tokens
        own = {"frozen": (frozen, plan.width)} if frozen else {}
        return {**own, "embedding": (plan.rows - frozen, plan.width)}

    def untrained(self, config: CartridgeConfig) -> Collection[str]:
        return ("frozen",)

    def stored_shapes(self, config: CartridgeConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return super().shapes(config, plan)

    def taken(self, config: CartridgeConfig, plan: SitePlan, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        whole, frozen = stored.get("embedding"), config.num_frozen_tokens
        if whole is None or whole.ndim != 2 or not frozen:  # of another shape it is refused
            return stored
        return {"frozen": whole[:frozen], "embedding": whole[frozen:]}

    def unfinished(self, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {}
