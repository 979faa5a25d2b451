"""HiRA (https://openreview.net/forum?id=TwJrTz9cRS): the base's weight is multiplied with a LoRA's, entry by entry.

    y = base(x) + (W * (B A)) dropout(x)

of full rank: a slot takes as many ranks as the weight's smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import full_rank
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

NAMES = ("hira_A", "hira_B")


@dataclass
class HiraConfig(AdapterConfig):
    """Names and defaults of ``peft.HiraConfig``, for linear layers.

    Args:
        r: rank of ``B A``.
        hira_dropout: on the update's input while training.
        init_weights: B starts as zeros; ``"gaussian"``: and A is normal; ``False``: both are.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] = True

    peft_type: ClassVar[str] = "HIRA"
    unsupported: ClassVar[Mapping[str, Any]] = {"rank_pattern": {}}
    reasons: ClassVar[Mapping[str, str]] = {"rank_pattern": "PEFT 0.21 gives a model's first adapter r everywhere"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("hira_dropout")


def hira(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    hira_A: Tensor,
    hira_B: Tensor,
    weight: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    x = x.type_as(hira_A)
    delta = weight.detach().type_as(hira_A) * (hira_B @ hira_A)
    out: Tensor = (y + kind.apply(x if dropout is None else dropout(x), delta)).type_as(y)
    return out


class Hira(Method[HiraConfig]):
    """Parameters ``hira_A`` [r, in] and ``hira_B`` [out, r]."""

    name = "hira"
    peft_type = "HIRA"
    config_class = HiraConfig
    follows_base = True

    def plan(self, config: HiraConfig, site: str, kind: Kind) -> SitePlan:
        if not kind.is_linear:
            raise AdapterError(f"{site}: HiRA adapts linear layers here, found {kind}; leave the site out")
        return SitePlan(kind, config.r, 1.0)

    def shapes(self, config: HiraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return dict(zip(NAMES, (plan.kind.a_shape(plan.rank), plan.kind.b_shape(plan.rank)), strict=True))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in NAMES}

    def initialise(self, config: HiraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        a, b = (parameters[name] for name in NAMES)
        if config.init_weights is False:
            nn.init.normal_(a)
            nn.init.normal_(b)
            return
        if config.init_weights == "gaussian":
            nn.init.normal_(a, std=1 / plan.rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def dropout(self, config: HiraConfig, kind: Kind) -> float:
        return config.hira_dropout

    def rewrite(self, name: str, config: HiraConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"hira:{name}", hira, site.operands(name, (*NAMES, "dropout")), reads=("weight",))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b = (parameters[name].to(torch.promote_types(parameters[name].dtype, torch.float32)) for name in NAMES)
        return full_rank(base.weight().to(a) * (b @ a), 1.0)

    def kept(self, config: HiraConfig, plan: SitePlan) -> Kept:
        return Kept()

    def scales(self, config: HiraConfig) -> bool:
        return False
