"""LoKr (https://arxiv.org/abs/2309.14859): the update is a Kronecker product of two small matrices.

    y = base(x) + alpha / r * (W1 kron W2) x

W2, the larger one, is a product of rank r where that is smaller, and so is W1 with ``decompose_both``. A slot has a
place of its own for the two; where that holds others, or other sizes, ``W1 kron (Wa Wb)`` is
``(W1 kron Wa) (I kron Wb)``, so that it is a LoRA of W1's smaller side times r ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.lycoris import Lycoris, LycorisConfig, applied, as_factors, exact, in_ranks, narrow
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.kronecker import KRONECKER, two_factors, work
from fxpeft.passes.targets.kinds import Kind

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass
class LoKrConfig(LycorisConfig):
    """Names and defaults of ``peft.LoKrConfig``.

    Args:
        r: rank of W2; where it is no smaller than half of W2's larger side, W2 is one matrix.
        decompose_factor: the smaller one of the two numbers that inputs and outputs are taken apart to; -1: near the
            root.
        decompose_both: W1 is a product too. rank_dropout_scale: scale up what rank_dropout leaves.
        init_weights: ``True``: W1 is zero; ``"lycoris"``: W2 is; ``False``: at random.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    peft_type: ClassVar[str] = "LOKR"


@dataclass(frozen=True)
class LoKrPlan(SitePlan):
    """``out``, ``into``: the two numbers whose product are the outputs and the inputs, W1's first."""

    out: tuple[int, int] = (1, 1)
    into: tuple[int, int] = (1, 1)
    decompose_factor: int = -1

    @property
    def factor(self) -> int:
        return self.decompose_factor


def kronecker(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    scaling: Tensor,
    dropped: Callable[[Tensor], Tensor] | None = None,
    **factors: Tensor,
) -> Tensor:
    """The training subgraph: the update is made whole, as in PEFT, and applied as the target's weight is."""
    return applied(kind, base, x, product(kind, factors) * scaling, dropped)


def product(kind: Kind, factors: Mapping[str, Tensor]) -> Tensor:
    """``[out, in, *kernel]``."""
    entries = "oi,pqk->poqik" if is_odd(kind, factors) else "oi,pq...->opiq..."
    return torch.einsum(entries, first(factors), whole(factors)).reshape(kind.out_features, *kind.a_shape(1)[1:])


def is_odd(kind: Kind, factors: Collection[str]) -> bool:
    """Whether PEFT's product is one of W1's two dimensions and the three of a conv1d's W2, in another order."""
    return "lokr_w2" in factors and len(kind.kernel) == 1


def first(factors: Mapping[str, Tensor]) -> Tensor:
    """W1."""
    return factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]


def whole(factors: Mapping[str, Tensor]) -> Tensor:
    """W2, ``[o2, i2, *kernel]``, or with its inputs and kernel as one dimension."""
    if "lokr_t2" in factors:
        names = ("lokr_t2", "lokr_w2_a", "lokr_w2_b")
        made: Tensor = torch.einsum("ij...,ip,jr->pr...", *(factors[name] for name in names))
        return made
    return factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"]


def second(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W2 as A ``[ranks, in * kernel]`` and B ``[ranks, out]``."""
    if "lokr_t2" in factors:
        return torch.einsum("ij...,jr->ir...", factors["lokr_t2"], factors["lokr_w2_b"]).flatten(1), factors[
            "lokr_w2_a"
        ]
    if "lokr_w2" in factors:
        return narrow(factors["lokr_w2"].flatten(1))
    return factors["lokr_w2_b"], factors["lokr_w2_a"].t()


def rank_first(kind: Kind, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The update as A ``[ranks, in, *kernel]`` and B ``[ranks, out]``, without its scale."""
    factors = exact(factors)
    (a1, b1), (a2, b2) = narrow(first(factors)), second(factors)
    ranks = len(a1) * len(a2)
    if is_odd(kind, factors) or ranks > min(kind.out_features, math.prod(kind.a_shape(1)[1:])):
        return as_factors(product(kind, factors))
    a = torch.einsum("pa,ib->piab", a1, a2).reshape(ranks, *kind.a_shape(1)[1:])
    return a, torch.einsum("po,iq->pioq", b1, b2).reshape(ranks, kind.out_features)


class LoKr(Lycoris[LoKrConfig]):
    """Parameters ``lokr_w1``, or ``lokr_w1_a`` and ``_b``; ``lokr_w2``, or ``lokr_w2_a``, ``_b`` and ``lokr_t2``."""

    name = "lokr"
    peft_type = "LOKR"
    config_class = LoKrConfig
    needs: ClassVar = {"lokr": KRONECKER}

    def plan(self, config: LoKrConfig, site: str, kind: Kind) -> LoKrPlan:
        plan = config.site_plan("LoKr", site, kind)
        out, into = (two_factors(size, config.decompose_factor) for size in (kind.out_features, kind.in_features))
        return LoKrPlan(kind, plan.rank, plan.scaling, out, into, config.decompose_factor)

    def shapes(self, config: LoKrConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, LoKrPlan)
        r, kernel, (o1, o2), (i1, i2) = plan.rank, plan.kind.kernel, plan.out, plan.into
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (o1, i1)}
        if config.decompose_both and r < max(o1, i1) / 2:
            shapes = {"lokr_w1_a": (o1, r), "lokr_w1_b": (r, i1)}
        if r >= max(o2, i2) / 2:
            return {**shapes, "lokr_w2": (o2, i2, *kernel)}
        if config.use_effective_conv2d and math.prod(kernel) > 1:
            core = (r, r, *kernel, *(1 for _ in range(2 - len(kernel))))
            return {**shapes, "lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2), "lokr_t2": core}
        return {**shapes, "lokr_w2_a": (o2, r), "lokr_w2_b": (r, i2 * math.prod(kernel))}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in NAMES}

    def initialise(self, config: LoKrConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
        for name in NAMES:
            if name in parameters and name in zero:
                nn.init.zeros_(parameters[name])
            elif name in parameters:
                nn.init.kaiming_uniform_(parameters[name], a=math.sqrt(5))

    def rescales(self, config: LoKrConfig) -> bool:
        return config.rank_dropout_scale

    def rewrite(self, name: str, config: LoKrConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"lokr:{name}", kronecker, site.operands(name, ("scaling", "dropped", *NAMES)))

    def notes(self, config: LoKrConfig, plans: Mapping[str, SitePlan]) -> list[str]:
        kinds = [plan.kind for plan in plans.values() if not is_odd(plan.kind, self.shapes(config, plan))]
        flops = sum(2 * work(kind, config.decompose_factor) for kind in kinds)
        factor, where = config.decompose_factor, "all sites" if len(kinds) == len(plans) else f"{len(kinds)} sites"
        return [f"in slots prepared with lokr_factor={factor}: no ranks, and {flops:,} flops/token, for {where}"]

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, LoKrPlan)
        (o1, o2), (i1, i2) = plan.out, plan.into
        own = (o1, i1), (o2, i2, *plan.kind.kernel)
        if base.place == own and not is_odd(plan.kind, parameters):
            factors = exact(parameters)
            w2 = whole(parameters if "lokr_w2" in parameters else factors).reshape(own[1])
            w1 = first(factors) * plan.scaling
            return SlotValues.without_ranks(plan.kind, w1=w1, w2=w2)
        return in_ranks(plan, *rank_first(plan.kind, parameters))
