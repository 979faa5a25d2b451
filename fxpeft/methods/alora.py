"""Activated LoRA (https://arxiv.org/abs/2504.12397): a LoRA that acts from its invocation's tokens on.

    y = base(x) + mask * scale * B A dropout(x)

The mask, one number for each token of a call, is no part of an adapter: :mod:`fxpeft.adapters.invocation` finds it in
the tokens that a model is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.methods.base import SiteAdapter, SitePlan
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import Lora, LoraConfig, lora
from fxpeft.passes.base import join
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.reach import ReachAt, reached
from fxpeft.passes.targets.kinds import Kind


def alora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    reach: ReachAt | Tensor,
    scaling: Tensor,
    **operands: Any,
) -> Tensor:
    """The training subgraph."""
    return lora(kind, base, x, scaling=reached(reach, x, scaling), **operands)


class Alora(Lora):
    """LoRA's parameters; the config's ``alora_invocation_tokens`` say from where on they act."""

    name = "alora"
    variant: ClassVar = {"alora_invocation_tokens": ...}
    needs: ClassVar = {"alora": ()}

    def takes(self, config: AdapterConfig) -> bool:
        return isinstance(config, LoraConfig) and config.alora_invocation_tokens is not None

    def declared(self, config: LoraConfig) -> str:
        return self.name

    def invocation(self, config: LoraConfig) -> tuple[int, ...]:
        return tuple(config.alora_invocation_tokens or ())

    def unmerged(self, config: LoraConfig) -> str:
        return "it acts on the tokens from its invocation on alone (alora_invocation_tokens)"

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> SitePlan:
        if not kind.is_linear:
            raise AdapterError(
                f"{site}: alora_invocation_tokens: expected a linear layer, as in PEFT, found {kind}; leave it out"
            )
        return super().plan(config, site, kind)

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        held = site.operands(name, ("lora_A", "lora_B", "scaling", "dropout"))
        return Rewrite(f"alora:{name}", alora, {**held, join(name, "reach"): site.reach})
