"""FourierFT (https://arxiv.org/abs/2405.03003): the update has a spectrum of a few trained numbers.

    y = base(x) + scaling * real(ifft2(F)) x,    F zero but at n places, which follow from a seed

of full rank: a slot takes as many ranks as the weight's smaller side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import applied, full_rank, scattered
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.one_node import one_node

C = TypeVar("C", bound=AdapterConfig)
SPECTRUM, PLACES, PATTERN = "fourierft_spectrum", "fourierft_places", "n_frequency_pattern"


@dataclass
class FourierFTConfig(AdapterConfig):
    """Names and defaults of ``peft.FourierFTConfig``.

    Args:
        n_frequency: how many numbers a site trains. n_frequency_pattern: name suffix or regular expression -> the
            site's own value. random_loc_seed: what their places follow from.
        scaling: of the update.
        init_weights: start as zeros; ``False``: normal.
        bias: ``"fourier_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    peft_type: ClassVar[str] = "FOURIERFT"
    patterns: ClassVar[tuple[str, ...]] = ("n_frequency_pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_frequency", "n_frequency_pattern")


@one_node
def transformed(spectrum: Tensor, where: Tensor, out: int, into: int) -> Tensor:
    """The update ``[out, in]`` in float32, which a Fourier transform needs, before it is scaled."""
    update: Tensor = torch.fft.ifft2(scattered(spectrum.float(), where, out, into)).real
    return update


def fourierft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    fourierft_spectrum: Tensor,
    fourierft_places: Tensor,
    scaling: Tensor,
) -> Tensor:
    """The training subgraph."""
    delta = transformed(fourierft_spectrum, fourierft_places, kind.out_features, kind.in_features) * scaling
    return applied(kind, base, x, delta.type_as(fourierft_spectrum), None)


class Spectral(Method[C]):
    """A parameter of n numbers, and their places in the weight, counted through, which stay and follow from a seed.

    ``names``: of the two. ``deviation``: of the numbers at the start, where that is at random.
    """

    title: ClassVar[str]
    names: ClassVar[tuple[str, str]]
    deviation: ClassVar[float] = 1.0

    def plan(self, config: C, site: str, kind: Kind) -> SitePlan:
        own: Any = config
        check_linear(self.title, site, kind)
        return self.planned(config, site, kind, pattern_value(own.n_frequency_pattern, site, own.n_frequency, PATTERN))

    def planned(self, config: C, site: str, kind: Kind, count: int) -> SitePlan:
        """A site's plan; ``AdapterError`` where its weight has fewer numbers."""
        own: Any = config
        if count > (size := kind.in_features * kind.out_features):
            raise AdapterError(f"{site}: n_frequency: expected at most its weight's {size} numbers, found {count}")
        return SitePlan(kind, count, own.scaling)

    def shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.names, (plan.rank,))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {self.names[0]: self.names[0]}

    def frozen(self, config: C) -> Collection[str]:
        return self.names[1:]

    def initialise(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        own: Any = config
        nn.init.normal_(parameters[self.names[0]], std=0.0 if own.init_weights else self.deviation)
        self.restore(config, plan, parameters, base)

    def restore(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        own: Any = config
        generator = torch.Generator().manual_seed(own.random_loc_seed)
        size = plan.kind.out_features * plan.kind.in_features
        parameters[self.names[1]].copy_(torch.randperm(size, generator=generator)[: plan.rank])

    def kept(self, config: C, plan: SitePlan) -> Kept:
        return Kept()


class FourierFT(Spectral[FourierFTConfig]):
    """Parameter ``fourierft_spectrum`` [n]; ``fourierft_places`` [n] stay."""

    name = "fourierft"
    peft_type = "FOURIERFT"
    config_class = FourierFTConfig
    title = "FourierFT"
    names = (SPECTRUM, PLACES)
    integers = (PLACES,)

    def rewrite(self, name: str, config: FourierFTConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"fourierft:{name}", fourierft, site.operands(name, (*self.names, "scaling")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        kind, both = plan.kind, (parameters[SPECTRUM], parameters[PLACES])
        return full_rank(transformed(*both, kind.out_features, kind.in_features), plan.scaling)
