"""LoHa (https://arxiv.org/abs/2108.06098): the update is the entry-wise product of two low-rank ones.

    y = base(x) + alpha / r * ((W1a W1b) * (W2a W2b)) x

which is a LoRA of r * r ranks. A convolution's may be decomposed along its kernel too (``use_effective_conv2d``):
``W1[o, i, k] = sum_j W1a[j, o] sum_l T1[j, l, k] W1b[l, i]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.lycoris import Lycoris, LycorisConfig, applied, as_factors, exact, in_ranks
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

PAIRS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


@dataclass
class LoHaConfig(LycorisConfig):
    """Names and defaults of ``peft.LoHaConfig``.

    Args:
        r: rank of each of the two; a slot needs ``r * r``, or as many as the smaller side of the weight.
        init_weights: start with no update; ``False``: at random.
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"


def hadamard(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    scaling: Tensor,
    dropped: Callable[[Tensor], Tensor] | None = None,
    **factors: Tensor,
) -> Tensor:
    """The training subgraph: the update is made whole, as in PEFT, and applied as the target's weight is."""
    first, second = (_product(kind, *(factors.get(name) for name in pair)) for pair in PAIRS)
    return applied(kind, base, x, (first * second) * scaling, dropped)


def _product(kind: Kind, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> Tensor:
    """One of the two, ``[out, in, *kernel]``."""
    assert a is not None
    assert b is not None
    if t is None:
        return (a @ b).view(kind.out_features, *kind.a_shape(1)[1:])
    reduced = torch.einsum("jl...,li->ji...", t, b)  # [r, in, kernel]
    return torch.einsum("ji...,jo->oi...", reduced, a).reshape(kind.out_features, *kind.a_shape(1)[1:])


def rank_first(kind: Kind, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The update as A ``[ranks, in, *kernel]`` and B ``[ranks, out]``, without its scale."""
    factors = exact(factors)
    r, inner = len(factors["hada_w1_b"]), math.prod(kind.a_shape(1)[1:])
    if r * r > min(inner, kind.out_features):  # as many ranks as there are inputs, or outputs, say it as well
        one, other = (_product(kind, *(factors.get(name) for name in pair)) for pair in PAIRS)
        return as_factors(one * other)
    (a1, b1), (a2, b2) = (_factors(*(factors.get(name) for name in pair)) for pair in PAIRS)
    a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(r * r, *kind.a_shape(1)[1:])
    return a, (b1.unsqueeze(1) * b2.unsqueeze(0)).reshape(r * r, -1)


class LoHa(Lycoris[LoHaConfig]):
    """Parameters ``hada_w1_a`` [out, r] and ``hada_w1_b`` [r, in], as PEFT lays them out; the same for ``w2``."""

    name = "loha"
    peft_type = "LOHA"
    config_class = LoHaConfig

    def plan(self, config: LoHaConfig, site: str, kind: Kind) -> SitePlan:
        return config.site_plan("LoHa", site, kind)

    def shapes(self, config: LoHaConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        kind, r = plan.kind, plan.rank
        sizes = kind.a_shape(1)[1:]
        if config.use_effective_conv2d and math.prod(kind.kernel) > 1:
            core = (r, r, *kind.kernel, *(1 for _ in range(2 - len(kind.kernel))))
            return {
                n: s for pair in PAIRS for n, s in zip(pair, ((r, kind.out_features), (r, sizes[0]), core), strict=True)
            }
        return {
            n: s
            for pair in PAIRS
            for n, s in zip(pair[:2], ((kind.out_features, r), (r, math.prod(sizes))), strict=True)
        }

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for pair in PAIRS for name in pair}

    def initialise(self, config: LoHaConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        for name in (*PAIRS[0][:2], *PAIRS[1][:2], PAIRS[0][2], PAIRS[1][2]):
            if name == "hada_w2_b" and config.init_weights:
                nn.init.zeros_(parameters[name])
            elif name in parameters:
                nn.init.kaiming_uniform_(parameters[name], a=math.sqrt(5))

    def rewrite(self, name: str, config: LoHaConfig, site: SiteAdapter) -> Rewrite:
        operands = ("scaling", "dropped", *(n for pair in PAIRS for n in pair))
        return Rewrite(f"loha:{name}", hadamard, site.operands(name, operands))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        return in_ranks(plan, *rank_first(plan.kind, parameters))


def _factors(a: Tensor | None, b: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """A ``[r, in * kernel]`` and B ``[r, out]`` of one of the two."""
    assert a is not None
    assert b is not None
    if t is None:
        return b, a.t()
    return torch.einsum("jl...,li->ji...", t, b).flatten(1), a
