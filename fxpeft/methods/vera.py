"""VeRA (https://arxiv.org/abs/2310.11454): all sites share frozen random factors, and each trains two vectors.

    y = base(x) + b * (B (d * (A dropout(x))))

A and B are cut to each site's size. They follow from ``projection_prng_key``, or come with the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

C = TypeVar("C", bound=AdapterConfig)


@dataclass
class VeraConfig(AdapterConfig):
    """Names and defaults of ``peft.VeraConfig``.

    Args:
        r: rank of the shared factors; a slot needs as many.
        projection_prng_key: the seed that they are drawn with. save_projection: write them into the file too.
        vera_dropout: on the update's input while training.
        d_initial: what d starts as; b starts as zero.
        init_weights: ``False``: d is normal, and b ones.
        bias: ``"vera_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's VeRA

    peft_type: ClassVar[str] = "VERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("vera_dropout")


def vera(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    vera_lambda_b: Tensor,
    vera_lambda_d: Tensor,
    vera_A: Tensor,
    vera_B: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph; the shared factors come to where the site is."""
    y = base(x)
    a, b = (cut.to(vera_lambda_d) for cut in (vera_A[:, : kind.in_features], vera_B[: kind.out_features]))
    h = kind.reduce(x if dropout is None else dropout(x.type_as(a)), a) * vera_lambda_d
    out: Tensor = (y + kind.expand(h, b) * vera_lambda_b).type_as(y)
    return out


class Projected(Method[C]):
    """Parameters ``<name>_lambda_b`` [out] and ``<name>_lambda_d``, beside frozen factors A and B that all sites share.

    ``per_rank``: how many rows A and d have for each rank. In evaluation the first r of them count.
    """

    per_rank: ClassVar[int] = 1
    title: ClassVar[str]
    vectors: ClassVar[tuple[str, str]]
    factors: ClassVar[tuple[str, str]]

    def plan(self, config: C, site: str, kind: Kind) -> SitePlan:
        own: Any = config
        check_linear(self.title, site, kind)
        return SitePlan(kind, own.r, 1.0)

    def shared(self, config: C, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        own: Any = config
        kinds = [plan.kind for plan in plans.values()]
        widest, most = max(kind.in_features for kind in kinds), max(kind.out_features for kind in kinds)
        return dict(zip(self.factors, ((self.per_rank * own.r, widest), (most, own.r)), strict=True))

    def shared_stored(self, config: C) -> Collection[str]:
        own: Any = config
        return self.factors if own.save_projection else ()

    def shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.vectors, ((plan.kind.out_features,), (self.per_rank * plan.rank,)), strict=True))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in self.vectors}

    def initialise(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        own: Any = config
        b, d = (parameters[name] for name in self.vectors)
        if own.init_weights:
            nn.init.zeros_(b)
            nn.init.constant_(d, own.d_initial)
        else:
            nn.init.ones_(b)
            nn.init.normal_(d)

    def operands(self, name: str, site: SiteAdapter, *more: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What a site's subgraph takes, and which of it all sites share."""
        shared = {f"{name}.shared.{key}": getattr(site.shared, key) for key in self.factors}
        return {**site.operands(name, (*self.vectors, *more, "dropout")), **shared}, tuple(shared)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        b, d = (parameters[name] for name in self.vectors)
        a0, b0 = (base.shared[name].to(d) for name in self.factors)
        rows = (b0[: plan.kind.out_features] * b.unsqueeze(1)).t()
        return SlotValues(a0[: plan.rank, : plan.kind.in_features], rows, d[: plan.rank].float())

    def scales(self, config: C) -> bool:
        return False


class Vera(Projected[VeraConfig]):
    """Parameters ``vera_lambda_b`` [out] and ``vera_lambda_d`` [r]."""

    name = "vera"
    peft_type = "VERA"
    config_class = VeraConfig
    title = "VeRA"
    vectors = ("vera_lambda_b", "vera_lambda_d")
    factors = ("vera_A", "vera_B")
    shared_keys: ClassVar[Mapping[str, str]] = {name: f"base_model.{name}" for name in factors}

    def initialise_shared(self, config: VeraConfig, shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name in self.factors:
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shared[name].shape[1]))  # as PEFT rounds it
            shared[name].copy_(torch.empty(shared[name].shape).uniform_(-bound, bound, generator=generator))

    def dropout(self, config: VeraConfig, kind: Kind) -> float:
        return config.vera_dropout

    def rewrite(self, name: str, config: VeraConfig, site: SiteAdapter) -> Rewrite:
        held, shared = self.operands(name, site)
        return Rewrite(f"vera:{name}", vera, held, shared=shared)

    def kept(self, config: VeraConfig, plan: SitePlan) -> Kept:
        # after A for d, times d for B, and what b multiplies
        return Kept(input=False, own=2 * plan.rank + plan.kind.out_features)
