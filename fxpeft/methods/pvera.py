"""PVeRA (https://arxiv.org/abs/2512.07703): VeRA whose inner numbers are drawn while it trains.

    y = base(x) + b * (B h),    h = m + e exp(v / 2),    [m, v] = d * (A dropout(x)),    e normal in training, else 0

A and B are shared by all sites and cut to each one's size, as VeRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Kept, SiteAdapter, SitePlan
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.vera import Projected
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node


@dataclass
class PveraConfig(AdapterConfig):
    """Names and defaults of ``peft.PveraConfig``.

    Args:
        r: rank of B; a slot needs as many. A has twice as many rows.
        projection_prng_key: the seed that the shared factors are drawn with. save_projection: write them into the file.
        pvera_dropout: on the update's input while training. generator_seed: what e is drawn with, at each site.
        d_initial: what d starts as; b starts as zero. init_weights: ``False``: d is normal, and b ones.
        sample_at_inference: not here: a call's outputs would be others each time.
        bias: ``"pvera_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "pvera_only"] = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's PVeRA

    peft_type: ClassVar[str] = "PVERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("pvera_dropout")
        if self.sample_at_inference:
            raise AdapterError("sample_at_inference=True: expected False: its outputs would be others at each call")


class Drawn(nn.Module):
    """From means and logarithms of variances, side by side, to numbers drawn of them; in evaluation to the means."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def forward(self, both: Tensor) -> Tensor:
        """``[..., 2 r]`` to ``[..., r]``."""
        mean, log = both.chunk(2, -1)
        if not self.training:
            return mean
        deviation = torch.exp(0.5 * log)
        if self.generator is None:
            return mean + torch.randn_like(deviation) * deviation
        drawn = torch.randn(deviation.shape, dtype=deviation.dtype, generator=self.generator)
        return mean + drawn.to(deviation.device) * deviation

    def __deepcopy__(self, memo: dict[int, object]) -> Drawn:
        return Drawn(self.seed).train(self.training)

    def __reduce__(self) -> tuple[object, ...]:
        return Drawn, (self.seed,), {"training": self.training}

    def extra_repr(self) -> str:
        """The seed."""
        return f"seed={self.seed}"


@one_node
def means(both: Tensor) -> Tensor:
    """``[..., 2 r]`` to ``[..., r]``, as :class:`Drawn` in evaluation."""
    return both.chunk(2, -1)[0]


def pvera(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    pvera_lambda_b: Tensor,
    pvera_lambda_d: Tensor,
    pvera_A: Tensor,
    pvera_B: Tensor,
    drawn: Callable[[Tensor], Tensor] | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph; the shared factors come to where the site is. A program has nothing that draws."""
    y = base(x)
    a, b = (cut.to(pvera_lambda_d) for cut in (pvera_A[:, : kind.in_features], pvera_B[: kind.out_features]))
    both = kind.reduce(x if dropout is None else dropout(x.type_as(a)), a) * pvera_lambda_d
    h = means(both) if drawn is None else drawn(both)
    out: Tensor = (y + kind.expand(h, b) * pvera_lambda_b).type_as(y)
    return out


class Pvera(Projected[PveraConfig]):
    """Parameters ``pvera_lambda_b`` [out] and ``pvera_lambda_d`` [2 r]."""

    name = "pvera"
    peft_type = "PVERA"
    config_class = PveraConfig
    per_rank = 2
    title = "PVeRA"
    vectors = ("pvera_lambda_b", "pvera_lambda_d")
    factors = ("pvera_A", "pvera_B")
    shared_keys: ClassVar[Mapping[str, str]] = {name: f"base_model.{name}" for name in factors}

    def initialise_shared(self, config: PveraConfig, shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name in self.factors:
            shared[name].copy_(nn.init.kaiming_uniform_(torch.empty(shared[name].shape), generator=generator))

    def dropout(self, config: PveraConfig, kind: Kind) -> float:
        return config.pvera_dropout

    def part(
        self, config: PveraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        made = super().part(config, plan, parameters, strength=strength)
        made.drawn = Drawn(config.generator_seed)
        return made

    def rewrite(self, name: str, config: PveraConfig, site: SiteAdapter) -> Rewrite:
        held, shared = self.operands(name, site, "drawn")
        return Rewrite(f"pvera:{name}", pvera, held, shared=shared)

    def kept(self, config: PveraConfig, plan: SitePlan) -> Kept:
        # after A for d, what is drawn and of what, and what b multiplies
        return Kept(input=False, own=6 * plan.rank + plan.kind.out_features)
