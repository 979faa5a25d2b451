"""WaveFT (https://arxiv.org/abs/2505.12532): the update has a wavelet transform of a few trained numbers.

    y = base(x) + scaling * idwt2(F) x,    F zero but at n places, which follow from a seed

of full rank: a slot takes as many ranks as the weight's smaller side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.fourierft import PATTERN, Spectral
from fxpeft.methods.lycoris import applied, full_rank, scattered
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

SPECTRUM, PLACES = "waveft_spectrum", "waveft_places"
FAMILIES = tuple(f"db{moments}" for moments in range(1, 11))  # those of PEFT's that a polynomial's roots give


@dataclass
class WaveFTConfig(AdapterConfig):
    """Names and defaults of ``peft.WaveFTConfig``.

    Args:
        n_frequency: how many numbers a site trains. n_frequency_pattern: name suffix or regular expression -> the
            site's own value. proportional_parameters: as many in all, each site by the size of its weight.
        random_loc_seed: what their places follow from. scaling: of the update.
        wavelet_family: one of Daubechies' wavelets, ``"db1"`` to ``"db10"``; PEFT's others are refused.
        use_idwt: ``False``: the numbers are entries of the weight, and there is no transform.
        init_weights: start as zeros; ``False``: near zero, at random.
        bias: ``"waveft_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = "WAVEFT"
    patterns: ClassVar[tuple[str, ...]] = (PATTERN,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_frequency", PATTERN)
        if self.use_idwt and self.wavelet_family not in FAMILIES:
            raise AdapterError(
                f"wavelet_family: expected one of {', '.join(FAMILIES)}, found {self.wavelet_family!r}: symlets and "
                "coiflets aren't here"
            )


@functools.lru_cache(maxsize=len(FAMILIES))
def low_pass(moments: int) -> tuple[float, ...]:
    """Daubechies' filter of so many vanishing moments, which puts a signal together again.

    It is what has all these moments and, of what is left, the roots within the unit circle. 0: there is none.
    """
    if not moments:
        return ()
    rest = [math.comb(moments - 1 + k, k) for k in reversed(range(moments))]  # in y = (2 - z - 1/z) / 4
    halves = [1 - 2 * y for y in np.roots(rest)]  # (z + 1/z) / 2
    roots = [min(half + s, half - s, key=abs) for half in halves for s in [np.sqrt(half * half - 1 + 0j)]]
    low = np.real(np.poly([*(-1.0 for _ in range(moments)), *roots]))
    return tuple((low * (math.sqrt(2) / low.sum())).tolist())


@one_node
def rebuilt(spectrum: Tensor, where: Tensor, out: int, into: int, taps: tuple[float, ...]) -> Tensor:
    """The update ``[out, in]`` in float32, before it is scaled; ``taps``: the low pass, or nothing."""
    spectrum, length = spectrum.float(), len(taps)
    if not length:
        return scattered(spectrum, where, out, into)
    low = torch.cat([spectrum.new_full((1,), number) for number in taps])
    high = torch.cat([spectrum.new_full((1,), number * (-1) ** n) for n, number in enumerate(reversed(taps))])
    # as much wider as the filters take off again, and even
    rows, columns = ((size + length - 1) // 2 * 2 for size in (out, into))
    at = (where // into + (rows - out) // 2) * columns + where % into + (columns - into) // 2
    dense = scattered(spectrum, at, rows, columns)
    bands = dense.view(2, rows // 2, 2, columns // 2).transpose(1, 2).flatten(0, 1)
    # as in PEFT what lies to the right is high along the rows, and what lies below along the columns
    pairs = torch.stack([torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))])
    whole = F.conv_transpose2d(bands.unsqueeze(0), pairs.unsqueeze(1), stride=2, padding=length - 2)[0, 0]
    return whole[:out, :into]


def waveft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    waveft_spectrum: Tensor,
    waveft_places: Tensor,
    scaling: Tensor,
    taps: tuple[float, ...],
) -> Tensor:
    """The training subgraph."""
    delta = rebuilt(waveft_spectrum, waveft_places, kind.out_features, kind.in_features, taps) * scaling
    return applied(kind, base, x, delta.type_as(waveft_spectrum), None)


@functools.lru_cache(maxsize=len(FAMILIES) + 1)
def _of(moments: int) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(waveft, taps=low_pass(moments))


@dataclass(frozen=True)
class WavePlan(SitePlan):
    """``moments`` of the wavelet, 0: there is no transform."""

    moments: int = 1


class WaveFT(Spectral[WaveFTConfig]):
    """Parameter ``waveft_spectrum`` [n]; ``waveft_places`` [n] stay."""

    name = "waveft"
    peft_type = "WAVEFT"
    config_class = WaveFTConfig
    title = "WaveFT"
    names = (SPECTRUM, PLACES)
    integers = (PLACES,)
    deviation = 0.01

    def plan(self, config: WaveFTConfig, site: str, kind: Kind) -> SitePlan:
        if not config.proportional_parameters:
            return super().plan(config, site, kind)
        check_linear(self.title, site, kind)
        return self.planned(config, site, kind, 1)

    def planned(self, config: WaveFTConfig, site: str, kind: Kind, count: int) -> WavePlan:
        own = super().planned(config, site, kind, count)
        moments = int(config.wavelet_family.removeprefix("db")) if config.use_idwt else 0
        return WavePlan(kind, own.rank, own.scaling, moments=moments)

    def arranged(self, config: WaveFTConfig, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        if not config.proportional_parameters:
            return dict(plans)
        sizes = {site: plan.kind.in_features * plan.kind.out_features for site, plan in plans.items()}
        budget, whole = config.n_frequency * len(sizes), sum(sizes.values())
        counts = {site: max(1, round(size / whole * budget)) for site, size in sizes.items()}
        return {site: self.planned(config, site, plans[site].kind, count) for site, count in counts.items()}

    def rewrite(self, name: str, config: WaveFTConfig, site: SiteAdapter) -> Rewrite:
        assert isinstance(site.plan, WavePlan)
        return Rewrite(f"waveft:{name}", _of(site.plan.moments), site.operands(name, (*self.names, "scaling")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, WavePlan)
        kind, both = plan.kind, (parameters[SPECTRUM], parameters[PLACES])
        return full_rank(rebuilt(*both, kind.out_features, kind.in_features, low_pass(plan.moments)), plan.scaling)
