"""BEFT (https://arxiv.org/abs/2509.15974): a bias is added to a target's output, in a slot its shift.

y = base(x) + b
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

BIAS = "beft_bias"


@dataclass
class BeftConfig(AdapterConfig):
    """Names and defaults of ``peft.BeftConfig``.

    Args:
        init_weights: start at zero; ``False``: at random.
    """

    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's BEFT
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "BEFT"


def beft(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, beft_bias: Tensor) -> Tensor:
    """The training subgraph."""
    y = base(x)
    out: Tensor = (y + kind.per_output(beft_bias.flatten())).type_as(y)
    return out


class Beft(Method[BeftConfig]):
    """The parameter ``beft_bias`` [1, out]."""

    name = "beft"
    peft_type = "BEFT"
    needs: ClassVar = {"beft": ("shift",)}
    config_class = BeftConfig

    def plan(self, config: BeftConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("BEFT", site, kind)
        return SitePlan(kind, 0, 1.0)

    def shapes(self, config: BeftConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {BIAS: (1, plan.kind.out_features)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {BIAS: BIAS}

    def initialise(self, config: BeftConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        nn.init.zeros_(parameters[BIAS]) if config.init_weights else nn.init.normal_(parameters[BIAS])

    def rewrite(self, name: str, config: BeftConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"beft:{name}", beft, site.operands(name, (BIAS,)))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        bias = parameters[BIAS].flatten()
        return SlotValues.without_ranks(plan.kind, shift=bias.to(torch.promote_types(bias.dtype, torch.float32)))

    def kept(self, config: BeftConfig, plan: SitePlan) -> Kept:
        return Kept(input=False)

    def scales(self, config: BeftConfig) -> bool:
        return False
