"""LoKr (https://arxiv.org/abs/2309.14859): the update is a Kronecker product of two small matrices.

    y = base(x) + alpha / r * (W1 kron W2) x

W2, the larger one, is a product of rank r where that is smaller, and so is W1 with ``decompose_both``.
``W1 kron (Wa Wb)`` is ``(W1 kron Wa) (I kron Wb)``, so that it is a LoRA of W1's smaller side times r ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.lycoris import Lycoris, LycorisConfig, applied, as_factors, exact, narrow
from fxpeft.passes.rewrite.inject import Rewrite
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


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the smaller one first, as PEFT finds them.

    They are ``factor`` and its partner where that divides it, else the two nearest to each other of which the smaller
    one is not above ``factor`` (-1: whatever it is).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    best = max((m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= most), default=1)
    return best, size // best


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
    entries = "oi,pq...->opiq..."
    if "lokr_t2" in factors:
        w2 = torch.einsum("ij...,ip,jr->pr...", *(factors[name] for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    elif "lokr_w2" in factors:
        w2 = factors["lokr_w2"]
        if len(kind.kernel) == 1:
            entries = "oi,pqk->poqik"  # PEFT's product of W1's two dimensions and these three
    else:
        w2 = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    return torch.einsum(entries, first(factors), w2).reshape(kind.out_features, *kind.a_shape(1)[1:])


def first(factors: Mapping[str, Tensor]) -> Tensor:
    """W1."""
    return factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]


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
    odd = "lokr_w2" in factors and len(kind.kernel) == 1  # see product
    if odd or ranks > min(kind.out_features, math.prod(kind.a_shape(1)[1:])):
        return as_factors(product(kind, factors))
    a = torch.einsum("pa,ib->piab", a1, a2).reshape(ranks, *kind.a_shape(1)[1:])
    return a, torch.einsum("po,iq->pioq", b1, b2).reshape(ranks, kind.out_features)


class LoKr(Lycoris[LoKrConfig]):
    """Parameters ``lokr_w1``, or ``lokr_w1_a`` and ``_b``; ``lokr_w2``, or ``lokr_w2_a``, ``_b`` and ``lokr_t2``."""

    name = "lokr"
    peft_type = "LOKR"
    config_class = LoKrConfig

    def plan(self, config: LoKrConfig, site: str, kind: Kind) -> LoKrPlan:
        plan = config.site_plan("LoKr", site, kind)
        sizes = (two_factors(size, config.decompose_factor) for size in (kind.out_features, kind.in_features))
        return LoKrPlan(kind, plan.rank, plan.scaling, *sizes)

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

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b = rank_first(plan.kind, parameters)
        return SlotValues(a, b, torch.full((len(a),), plan.scaling))
