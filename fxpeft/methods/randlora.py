"""RandLoRA (https://arxiv.org/abs/2502.00987): as many random LoRAs as make a full rank, which all sites share, scaled.

    y = base(x) + alpha / r * B A dropout(x),    A = lambda * (A0 * gamma)

for a site with fewer inputs than outputs; else the other way round. ``B`` and ``A0`` are cut to each site's size, and
follow from ``projection_prng_key``, or come with the file. A slot takes as many ranks as the weight's smaller side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from accelerate.utils.imports import is_bf16_available
from torch import Tensor, nn

from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import exact, full_rank
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

SCALES, FACTORS = ("randlora_lambda", "randlora_gamma"), ("randlora_A", "randlora_B")


@dataclass
class RandLoraConfig(AdapterConfig):
    """Names and defaults of ``peft.RandLoraConfig``.

    Args:
        r: rank of each LoRA; there are as many as make the rank of a site's smaller side.
        projection_prng_key: the seed that the factors are drawn with. save_projection: write them into the file too.
        sparse: they are of -1, 0 and 1, a third of them not 0; very_sparse: fewer.
        randlora_alpha: the update is scaled by ``randlora_alpha / r``.
        randlora_dropout: on the update's input while training.
        init_weights: lambda starts as zeros; ``False``: normal.
        bias: ``"randlora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's RandLoRA

    peft_type: ClassVar[str] = "RANDLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("randlora_dropout")


@one_node
def scaled(scale: Tensor, gamma: Tensor, a: Tensor) -> Tensor:
    """A ``[r * count, size]`` of ``[r, count]``, ``[count, size]`` and ``[r, 1, most]``."""
    return (scale.unsqueeze(2) * a[:, :, : gamma.shape[1]].to(scale) * gamma).flatten(0, 1)


@one_node
def cut(b: Tensor, gamma: Tensor, size: int) -> Tensor:
    """B ``[size, count * r]`` of ``[most, counts, r]``."""
    return b[:size, : len(gamma)].to(gamma).flatten(1)


def factors(kind: Kind, scale: Tensor, gamma: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What reduces the inputs, and what expands to the outputs."""
    into, out = kind.in_features, kind.out_features
    small, large = scaled(scale, gamma, a), cut(b, gamma, max(into, out))
    return (small, large) if into <= out else (large.t(), small.t())


def randlora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    randlora_A: Tensor,
    randlora_B: Tensor,
    scaling: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph; the shared factors come to where the site is."""
    y = base(x)
    first, second = factors(kind, randlora_lambda, randlora_gamma, randlora_A, randlora_B)
    x = x.type_as(randlora_lambda)
    h = kind.expand(kind.reduce(x if dropout is None else dropout(x), first), second)
    out: Tensor = (y + kind.scale(h, scaling)).type_as(y)
    return out


class RandLora(Method[RandLoraConfig]):
    """``randlora_lambda`` [r, count] and ``randlora_gamma`` [count, size] of a site's smaller side; factors stay."""

    name = "randlora"
    peft_type = "RANDLORA"
    config_class = RandLoraConfig
    shared_keys: ClassVar[Mapping[str, str]] = {name: f"base_model.{name}" for name in FACTORS}

    def plan(self, config: RandLoraConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("RandLoRA", site, kind)
        return SitePlan(kind, config.r, config.randlora_alpha / config.r)

    def shared(self, config: RandLoraConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        kinds = [plan.kind for plan in plans.values()]
        sizes = max(kind.in_features for kind in kinds), max(kind.out_features for kind in kinds)
        count = -(-min(sizes) // config.r)
        return dict(zip(FACTORS, ((config.r, 1, min(sizes)), (max(sizes), count, config.r)), strict=True))

    def shared_stored(self, config: RandLoraConfig) -> Collection[str]:
        return FACTORS if config.save_projection else ()

    def initialise_shared(self, config: RandLoraConfig, shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        a, b = (shared[name] for name in FACTORS)
        if config.sparse or config.very_sparse:
            limit = 1 / (2 * (math.sqrt(a.shape[2]) if config.very_sparse else 3))
            drawn = [torch.rand(each.shape, generator=generator) for each in (a, b)]
            made = [(each > 1 - limit).float() - (each < limit).float() for each in drawn]
        else:
            dtype = torch.bfloat16 if is_bf16_available() else torch.float16  # as PEFT draws them
            start = functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
            columns = (len(b), 1, b.shape[2])
            made = [start(torch.empty(a.shape, dtype=dtype))]
            made.append(torch.cat([start(torch.empty(columns, dtype=dtype)) for _ in range(b.shape[1])], 1))
        for each, drawn_one in zip((a, b), made, strict=True):
            each.copy_(drawn_one / drawn_one.std())

    def shapes(self, config: RandLoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        size = min(plan.kind.in_features, plan.kind.out_features)
        count = -(-size // plan.rank)
        return dict(zip(SCALES, ((plan.rank, count), (count, size)), strict=True))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in SCALES}

    def initialise(self, config: RandLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        scale, gamma = (parameters[name] for name in SCALES)
        if config.init_weights:
            nn.init.zeros_(scale)
            nn.init.constant_(gamma, 1 / max(gamma.shape))
        else:
            nn.init.normal_(scale)
            nn.init.constant_(gamma, 1 / max(plan.kind.in_features, plan.kind.out_features))

    def read(self, config: RandLoraConfig, tensors: dict[str, Tensor]) -> tuple[RandLoraConfig, dict[str, Tensor]]:
        """PEFT writes the shared factors a second time at each site."""
        again = tuple(f".{name}" for name in FACTORS)
        whole = self.shared_keys.values()
        return config, {key: t for key, t in tensors.items() if key in whole or not key.endswith(again)}

    def dropout(self, config: RandLoraConfig, kind: Kind) -> float:
        return config.randlora_dropout

    def rewrite(self, name: str, config: RandLoraConfig, site: SiteAdapter) -> Rewrite:
        shared = {f"{name}.shared.{key}": getattr(site.shared, key) for key in FACTORS}
        held = {**site.operands(name, (*SCALES, "scaling", "dropout")), **shared}
        return Rewrite(f"randlora:{name}", randlora, held, shared=tuple(shared))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        scale, gamma = exact(parameters).values()
        first, second = factors(plan.kind, scale, gamma, *(base.shared[name].to(scale) for name in FACTORS))
        return full_rank(second @ first, plan.scaling)

    def kept(self, config: RandLoraConfig, plan: SitePlan) -> Kept:
        # after what reduces, of as many numbers as all LoRAs have ranks
        return Kept(own=plan.rank * -(-min(plan.kind.in_features, plan.kind.out_features) // plan.rank))
