"""UniLoRA, as PEFT has it: a LoRA whose entries are picked from one short trained vector that all sites share.

    y = base(x) + B A dropout(x),    A = theta[i] * s[i],    B = theta[j] * s[j]

The places i and j follow from a seed, each of theta's entries as often as another; s is one over the root of how often.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import outside
from fxpeft.methods.parts import check_linear
from fxpeft.passes.base import attribute
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

THETA, PLACES = "unilora_theta_d", ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")
MOST_RANKS = 256  # no tensor of a file that holds theta alone bounds them


@dataclass
class UniLoraConfig(AdapterConfig):
    """Names and defaults of ``peft.UniLoraConfig``.

    Args:
        r: rank. theta_d_length: how many numbers are trained, for all sites together.
        proj_seed: what the places follow from. save_indices: write them into the file, and the scales.
        init_theta_d_bound: theta starts uniform within; ``init_weights=False``: normal.
        unilora_dropout: on the update's input while training.
        bias: ``"unilora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's UniLoRA

    peft_type: ClassVar[str] = "UNILORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "theta_d_length", "init_theta_d_bound")
        self.check_at_most(MOST_RANKS, "r")
        if self.proj_seed < 0:
            raise AdapterError(f"proj_seed: expected a seed from 0 on, which NumPy takes, found {self.proj_seed}")
        self.check_probability("unilora_dropout")


@dataclass(frozen=True)
class UniLoraPlan(SitePlan):
    """``first``: which of all sites' entries is A's first one. ``total``: how many there are."""

    first: int = 0
    total: int = 0


@functools.lru_cache(maxsize=1)
def order(total: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each entry of all sites its place in theta, and for each place its scale; once for all sites."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    found = torch.from_numpy(places)
    counts = torch.bincount(found, minlength=length).float()
    return found, torch.where(counts > 0, counts.rsqrt(), 0.0)


@one_node
def picked(theta: Tensor, places: Tensor, scales: Tensor) -> Tensor:
    """A factor of theta, which comes to where the site is."""
    return theta.to(scales.device)[places.to(scales.device)] * scales


def unilora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    unilora_theta_d: Tensor,
    unilora_indices_A: Tensor,
    unilora_indices_B: Tensor,
    unilora_scales_A: Tensor,
    unilora_scales_B: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    a = picked(unilora_theta_d, unilora_indices_A, unilora_scales_A)
    b = picked(unilora_theta_d, unilora_indices_B, unilora_scales_B)
    x = x.type_as(a)
    out: Tensor = (y + kind.expand(kind.reduce(x if dropout is None else dropout(x), a), b)).type_as(y)
    return out


class UniLora(Method[UniLoraConfig]):
    """``unilora_theta_d`` [length], which all sites share; places and scales [r, in] and [out, r] stay."""

    name = "unilora"
    peft_type = "UNILORA"
    config_class = UniLoraConfig
    shared_keys: ClassVar[Mapping[str, str]] = {THETA: f"base_model.{THETA}"}
    ordered = True
    integers = PLACES

    def plan(self, config: UniLoraConfig, site: str, kind: Kind) -> UniLoraPlan:
        check_linear("UniLoRA", site, kind)
        return UniLoraPlan(kind, config.r, 1.0, total=config.r * (kind.in_features + kind.out_features))

    def arranged(self, config: UniLoraConfig, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        sizes = [plan.rank * (plan.kind.in_features + plan.kind.out_features) for plan in plans.values()]
        firsts = itertools.accumulate(sizes, initial=0)
        return {
            site: UniLoraPlan(plan.kind, plan.rank, 1.0, first=first, total=sum(sizes))
            for (site, plan), first in zip(plans.items(), firsts, strict=False)
        }

    def shared(self, config: UniLoraConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        return {THETA: (config.theta_d_length,)}

    def shared_trained(self, config: UniLoraConfig) -> Collection[str]:
        return (THETA,)

    def initialise_shared(self, config: UniLoraConfig, shared: Mapping[str, Tensor]) -> None:
        if config.init_weights:
            nn.init.uniform_(shared[THETA], -config.init_theta_d_bound, config.init_theta_d_bound)
        else:
            nn.init.normal_(shared[THETA])

    def shapes(self, config: UniLoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shapes = (plan.kind.a_shape(plan.rank), plan.kind.b_shape(plan.rank))
        return dict(zip((*PLACES, *SCALES), (*shapes, *shapes), strict=True))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (*PLACES, *SCALES)}

    def frozen(self, config: UniLoraConfig) -> Collection[str]:
        return () if config.save_indices else (*PLACES, *SCALES)

    def untrained(self, config: UniLoraConfig) -> Collection[str]:
        return (*PLACES, *SCALES) if config.save_indices else ()

    def initialise(self, config: UniLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        self.restore(config, plan, parameters, base)

    def restore(self, config: UniLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """As PEFT, which rounds the scales as the base's weight."""
        assert isinstance(plan, UniLoraPlan)
        places, scales = order(plan.total, config.theta_d_length, config.proj_seed)
        weight, first = attribute(base.module, "weight"), plan.first
        for place, scale in zip(PLACES, SCALES, strict=True):
            own = places[first : first + parameters[place].numel()].view(parameters[place].shape)
            first += own.numel()
            parameters[place].copy_(own)
            parameters[scale].copy_(scales[own].to(weight.dtype if weight.is_floating_point() else scales.dtype))

    def why_unfit(self, config: UniLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor]) -> str | None:
        wrong = [n for n in PLACES if n in parameters and outside(parameters[n], config.theta_d_length)]
        return (
            f"{wrong[0]}: expected places below theta_d_length {config.theta_d_length}, found others" if wrong else None
        )

    def dropout(self, config: UniLoraConfig, kind: Kind) -> float:
        return config.unilora_dropout

    def rewrite(self, name: str, config: UniLoraConfig, site: SiteAdapter) -> Rewrite:
        theta = {f"{name}.shared.{THETA}": getattr(site.shared, THETA)}
        held = {**site.operands(name, (*PLACES, *SCALES, "dropout")), **theta}
        return Rewrite(f"unilora:{name}", unilora, held, shared=tuple(theta))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        pairs = [(parameters[p], parameters[s]) for p, s in zip(PLACES, SCALES, strict=True)]
        a, b = (picked(base.shared[THETA], places, scales) for places, scales in pairs)
        return SlotValues(a, b.t(), torch.ones(plan.rank))

    def scales(self, config: UniLoraConfig) -> bool:
        return False
