"""LoHa (https://arxiv.org/abs/2108.06098): the update is the entry-wise product of two low-rank ones.

    y = base(x) + alpha / r * ((W1a W1b) * (W2a W2b)) x

which is a LoRA of r * r ranks. A convolution's may be decomposed along its kernel too (``use_effective_conv2d``):
``W1[o, i, k] = sum_j W1a[j, o] sum_l T1[j, l, k] W1b[l, i]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, short
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig, check_pattern
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value

PAIRS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


@dataclass
class LycorisConfig(AdapterConfig):
    """What LoHa's and LoKr's configs have both.

    Args:
        alpha: the update is scaled by ``alpha / r``. rank_pattern, alpha_pattern: as in :class:`~fxpeft.LoraConfig`.
        rank_dropout: of outputs of the update, while training. module_dropout: of the update at a site as a whole.
        use_effective_conv2d: decompose convolutions along their kernel too, other than 1x1.
    """

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)

    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        for name in self.patterns:
            for key in getattr(self, name):
                check_pattern(name, key)
        for where, rank in (("r", self.r), *((f"rank_pattern[{short(k)}]", v) for k, v in self.rank_pattern.items())):
            if rank <= 0:
                raise AdapterError(f"{where}: expected a positive integer, found {rank}")
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise AdapterError(f"{name}: expected a probability in [0, 1), found {getattr(self, name)}")

    def site_plan(self, what: str, site: str, kind: Kind) -> SitePlan:
        """Rank and scaling at a site.

        Raises:
            AdapterError: it is of no kind that can be adapted.
        """
        if not kind.is_linear and (len(kind.kernel) not in (1, 2) or kind.groups > 1):
            raise AdapterError(
                f"{site}: {what} adapts linear layers, conv1d and conv2d without groups, found {kind}; leave the site "
                "out"
            )
        rank = pattern_value(self.rank_pattern, site, self.r)
        return SitePlan(kind, rank, pattern_value(self.alpha_pattern, site, self.alpha, "alpha_pattern") / rank)


@dataclass
class LoHaConfig(LycorisConfig):
    """Names and defaults of ``peft.LoHaConfig``.

    Args:
        r: rank of each of the two; a slot needs ``r * r``, or as many as the smaller side of the weight.
        init_weights: start with no update; ``False``: at random.
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"


class Dropped(nn.Module):
    """An update ``[out, ...]`` without some of its outputs, scaled up for the others, or without all of it."""

    def __init__(self, outputs: float, site: float, *, rescaled: bool = True) -> None:
        super().__init__()
        self.outputs, self.site, self.rescaled = outputs, site, rescaled

    def forward(self, delta: Tensor) -> Tensor:
        """As it is unless it trains; drawn on the CPU, in PEFT's order."""
        if not self.training:
            return delta
        there = (torch.rand(1) > self.site).to(delta)
        if self.outputs:
            kept = (torch.rand(delta.shape[0]) > self.outputs).to(delta)
            kept = kept / kept.mean() if self.rescaled else kept
            delta = delta * kept.view(-1, *(1 for _ in delta.shape[1:]))
        return delta * there

    def extra_repr(self) -> str:
        """Both probabilities."""
        return f"outputs={self.outputs}, site={self.site}"


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
    y = base(x)
    first, second = (_product(kind, *(factors.get(name) for name in pair)) for pair in PAIRS)
    delta = (first * second) * scaling
    if dropped is not None:
        delta = dropped(delta)
    out: Tensor = (y + kind.apply(x.type_as(delta), delta)).type_as(y)
    return out


def _product(kind: Kind, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> Tensor:
    """One of the two, ``[out, in, *kernel]``."""
    assert a is not None
    assert b is not None
    if t is None:
        return (a @ b).view(kind.out_features, *kind.a_shape(1)[1:])
    reduced = torch.einsum("jlpq,li->jipq", t, b)  # [r, in, kernel]
    return torch.einsum("jipq,jo->oipq", reduced, a).reshape(kind.out_features, *kind.a_shape(1)[1:])


class LoHa(Method[LoHaConfig]):
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

    def part(
        self, config: LoHaConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        made = super().part(config, plan, parameters, strength=strength)
        if config.rank_dropout or config.module_dropout:
            made.dropped = Dropped(config.rank_dropout, config.module_dropout)
        return made

    def rewrite(self, name: str, config: LoHaConfig, site: SiteAdapter) -> Rewrite:
        operands = ("scaling", "dropped", *(n for pair in PAIRS for n in pair))
        return Rewrite(
            f"loha:{name}", hadamard, {f"{name}.{o}": getattr(site, o) for o in operands if hasattr(site, o)}
        )

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        kind, r = plan.kind, plan.rank
        inner = math.prod(kind.a_shape(1)[1:])
        if r * r > min(inner, kind.out_features):  # as many ranks as there are inputs, or outputs, say it as well
            first, second = (_product(kind, *(parameters.get(name) for name in pair)) for pair in PAIRS)
            return full_rank(kind, first * second, plan.scaling)
        (a1, b1), (a2, b2) = (_factors(kind, *(parameters.get(name) for name in pair)) for pair in PAIRS)
        a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(r * r, *kind.a_shape(1)[1:])
        b = (b1.unsqueeze(1) * b2.unsqueeze(0)).reshape(r * r, -1)
        return SlotValues(a, b, torch.full((r * r,), plan.scaling))

    def kept(self, config: LoHaConfig, plan: SitePlan) -> Kept:
        return Kept()  # the update is made of parameters alone


def _factors(kind: Kind, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """A ``[r, in * kernel]`` and B ``[r, out]`` of one of the two."""
    assert a is not None
    assert b is not None
    if t is None:
        return b, a.t()
    return torch.einsum("jlpq,li->jipq", t, b).flatten(1), a


def full_rank(kind: Kind, delta: Tensor, scaling: float) -> SlotValues:
    """Slot values of an update ``[out, in, *kernel]``, of as many ranks as it has outputs or inputs."""
    flat = delta.flatten(1)
    out, inner = flat.shape
    if out <= inner:
        return SlotValues(delta, torch.eye(out).to(delta), torch.full((out,), scaling))
    a = torch.eye(inner).to(delta).view(inner, *delta.shape[1:])
    return SlotValues(a, flat.t(), torch.full((inner,), scaling))
