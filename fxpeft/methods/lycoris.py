"""What LoHa and LoKr share: an update that is made whole in training, as in PEFT, and dropped as a whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.base import PassError
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.one_node import one_node


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
        super().__post_init__()
        self.check_positive("r", "rank_pattern")
        self.check_probability("rank_dropout", "module_dropout")

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


C = TypeVar("C", bound=LycorisConfig)


class Lycoris(Method[C]):
    """A method whose update is made of parameters alone."""

    def part(
        self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        made = super().part(config, plan, parameters, strength=strength)
        if config.rank_dropout or config.module_dropout:
            made.dropped = Dropped(config.rank_dropout, config.module_dropout, rescaled=self.rescales(config))
        return made

    def rescales(self, config: C) -> bool:
        """Whether the outputs that rank_dropout leaves are scaled up for the others."""
        return True

    def kept(self, config: C, plan: SitePlan) -> Kept:
        return Kept()

    def flops(self, config: C, plan: SitePlan) -> int:
        return 2 * plan.kind.out_features * math.prod(plan.kind.a_shape(1)[1:])


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


def applied(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    delta: Tensor,
    dropped: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The target's output and that of an update ``[out, in, *kernel]``, which is applied as its weight is."""
    y = base(x)
    if dropped is not None:
        delta = dropped(delta)
    out: Tensor = (y + kind.apply(x.type_as(delta), delta)).type_as(y)
    return out


def outside(places: Tensor, size: int) -> bool:
    """Whether any of these is no place of so many."""
    return bool(((places < 0) | (places >= size)).any())


@one_node
def scattered(values: Tensor, places: Tensor, out: int, into: int) -> Tensor:
    """An update ``[out, in]`` of single entries, whose places are counted through it; those of one place add up."""
    made: Tensor = values.new_zeros(out * into).index_add(0, places, values).view(out, into)
    return made


def exact(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors in which a product is made: of half precision's in float32, as what is trained has it."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in factors.values()), torch.float32)
    return {name: tensor.to(dtype) for name, tensor in factors.items()}


def narrow(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix ``[out, in]`` as A and B of as many ranks as its smaller side."""
    out, inner = matrix.shape
    if out <= inner:
        return matrix, torch.eye(out).to(matrix)
    return torch.eye(inner).to(matrix), matrix.t()


def as_factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[ranks, in, *kernel]`` and B ``[ranks, out]`` of an update, of as many ranks as it has outputs or inputs."""
    a, b = narrow(delta.flatten(1))
    return a.view(len(a), *delta.shape[1:]), b


def in_ranks(plan: SitePlan, a: Tensor, b: Tensor) -> SlotValues:
    """Slot values of an update as A ``[ranks, in, *kernel]`` and B ``[ranks, out]``, without its scale.

    Raises:
        PassError: a slot applies A in another way than the target its weight.
    """
    if not plan.kind.like_target:
        raise PassError(
            'with padding="same" and dilation a LoRA is a convolution without dilation, and this update has the '
            "target's; leave the site out"
        )
    return SlotValues(a, b, torch.full((len(a),), plan.scaling))


def full_rank(delta: Tensor, scaling: float) -> SlotValues:
    """Slot values of an update ``[out, in, *kernel]``, of as many ranks as it has outputs or inputs."""
    a, b = as_factors(delta)
    return SlotValues(a, b, torch.full((len(a),), scaling))
