"""IA3 (https://arxiv.org/abs/2205.05638): one learned gain per output feature, or per input feature of a feedforward.

y = l * base(x)    or    y = base(l * x)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig, check_pattern
from fxpeft.methods.defaults import default_feedforward
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import Endings
from fxpeft.passes.targets.regex import compiled


@dataclass
class IA3Config(AdapterConfig):
    """IA3's config: names and defaults of ``peft.IA3Config``.

    Args:
        feedforward_modules: targets whose input is multiplied, not their output: names or ends of
            names, or one regular expression; ``None`` takes the architecture's, as for the targets.
        init_ia3_weights: start at ones, which changes nothing; ``False``: normal.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    feedforward_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True
    layers_to_transform: None = field(default=None, init=False)  # no fields of PEFT's IA3
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        own = self.feedforward_modules
        if isinstance(own, Collection) and not isinstance(own, str):
            self.feedforward_modules = sorted(set(own))
        super().__post_init__()
        own, targets = self.feedforward_modules, self.target_modules
        if isinstance(own, str):
            check_pattern("feedforward_modules", own)
        if isinstance(own, list) and isinstance(targets, list) and not set(own) <= set(targets):
            missing = ", ".join(sorted(set(own) - set(targets)))
            raise AdapterError(f"feedforward_modules: expected a part of target_modules, which lacks {missing}")


def ia3(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, ia3_l: Tensor) -> Tensor:
    """The training subgraph of a target whose output is multiplied."""
    y = base(x)
    out: Tensor = (y * kind.per_output(ia3_l.flatten())).type_as(y)
    return out


def ia3_feedforward(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, ia3_l: Tensor) -> Tensor:
    """The training subgraph of a target whose input is multiplied."""
    return base((x * kind.per_input(ia3_l.flatten())).type_as(x))


@dataclass(frozen=True)
class Ia3Plan(SitePlan):
    """``feedforward``: the gain is one of the input."""

    feedforward: bool = False


class Ia3(Method[IA3Config]):
    """The parameter ``ia3_l``."""

    name = "ia3"
    peft_type = "IA3"
    needs: ClassVar = {"ia3": ("g_in", "g_out")}
    config_class = IA3Config

    def resolve(self, config: IA3Config, model: nn.Module) -> IA3Config:
        if config.feedforward_modules is not None:
            return config
        return config.changed(feedforward_modules=default_feedforward(model))

    def plan(self, config: IA3Config, site: str, kind: Kind) -> Ia3Plan:
        if kind.looks_up:
            raise AdapterError(f"{site}: IA3 of an embedding is not supported, as in PEFT; leave the site out")
        names = config.feedforward_modules or ()
        if isinstance(names, str):
            feedforward = compiled(names, "feedforward_modules").fullmatch(site)
        else:
            feedforward = Endings(names)(site)  # PEFT: an end of the name, dotted or not
        return Ia3Plan(kind, 0, 1.0, feedforward)

    def shapes(self, config: IA3Config, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        feedforward = isinstance(plan, Ia3Plan) and plan.feedforward
        count = plan.kind.in_features if feedforward else plan.kind.out_features
        if plan.kind.kernel:
            return {"ia3_l": (1, count, *(1 for _ in plan.kind.kernel))}
        return {"ia3_l": (1, count) if feedforward else (count, 1)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"ia3_l": "ia3_l"}

    def initialise(self, config: IA3Config, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        nn.init.ones_(parameters["ia3_l"]) if config.init_ia3_weights else nn.init.normal_(parameters["ia3_l"])

    def rewrite(self, name: str, config: IA3Config, site: SiteAdapter) -> Rewrite:
        feedforward = isinstance(site.plan, Ia3Plan) and site.plan.feedforward
        return Rewrite(f"ia3:{name}", ia3_feedforward if feedforward else ia3, {f"{name}.ia3_l": site.ia3_l})

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        feature = "g_in" if isinstance(plan, Ia3Plan) and plan.feedforward else "g_out"
        return SlotValues.without_ranks(plan.kind, **{feature: parameters["ia3_l"].flatten().to(torch.float32)})

    def kept(self, config: IA3Config, plan: SitePlan) -> Kept:
        feedforward = isinstance(plan, Ia3Plan) and plan.feedforward
        return Kept(feedforward, outputs=0 if feedforward else plan.kind.out_features)

    def scales(self, config: IA3Config) -> bool:
        return False
