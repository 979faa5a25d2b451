"""OSF (https://arxiv.org/abs/2504.07097): the weight's smaller singular values and their vectors are trained.

    y = base(x) + (U diag(s) V - U0 diag(s0) V0) x

with ``U0 diag(s0) V0`` the weight's part beyond its first ``effective_rank`` singular vectors, to which U and V stay
orthogonal: their gradients are projected. It is found again in the base. A slot takes twice as many ranks as are
trained, or as many as the weight's smaller side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import exact, full_rank
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

TRAINED = ("osf_U_low", "osf_S_low", "osf_V_low")
FIRST = ("osf_U_first", "osf_S_first", "osf_V_first")
KEPT = ("osf_U_high", "osf_V_high")


@dataclass
class OSFConfig(AdapterConfig):
    """Names and defaults of ``peft.OSFConfig``.

    Args:
        effective_rank: how many singular vectors stay: a number, or a part of the weight's smaller side; by default
            half of it.
        init_weights: start with the base's; ``False``: at random.
        target_svd_config: accepted for PEFT's sake, which passes over it.
    """

    effective_rank: int | float | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's OSF
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "OSF"
    unsupported: ClassVar[Mapping[str, Any]] = {"rank_pattern": None}
    reasons: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "PEFT searches its expressions anywhere in a name, which no other pattern does"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.effective_rank is not None and self.effective_rank <= 0:
            raise AdapterError(f"effective_rank: expected a positive number, found {self.effective_rank}")


@dataclass(frozen=True)
class OsfPlan(SitePlan):
    """``stay``: how many singular vectors do. ``trained``: how many are."""

    stay: int = 1
    trained: int = 1


@one_node
def projected(trained: Tensor, first: Tensor, high: Tensor | None) -> Tensor:
    """The same, with a gradient that is orthogonal to the singular vectors that stay.

    Args:
        trained: U ``[out, r]``, or V transposed. first: what it started as. high: those that stay, where they aren't
            all that ``first`` leaves.
    """
    way = trained - trained.detach()  # zeros, and where the gradient goes
    basis = (first if high is None else high).type_as(way)
    within = basis @ (basis.t() @ way)
    return trained.detach() + (within if high is None else way - within)


def factors(u: Tensor, s: Tensor, v: Tensor, u0: Tensor, s0: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[2 r, in]`` and B ``[out, 2 r]`` of the update."""
    return torch.cat([v, v0]), torch.cat([u * s, -(u0 * s0)], 1)


def osf(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    osf_U_low: Tensor,
    osf_S_low: Tensor,
    osf_V_low: Tensor,
    osf_U_first: Tensor,
    osf_S_first: Tensor,
    osf_V_first: Tensor,
    osf_U_high: Tensor | None = None,
    osf_V_high: Tensor | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    u = projected(osf_U_low, osf_U_first, osf_U_high)
    v = projected(osf_V_low.t(), osf_V_first.t(), None if osf_V_high is None else osf_V_high.t()).t()
    a, b = factors(u, osf_S_low, v, osf_U_first, osf_S_first, osf_V_first)
    out: Tensor = (y + kind.expand(kind.reduce(x, a), b)).type_as(y)
    return out


class Osf(Method[OSFConfig]):
    """``osf_U_low`` [out, r], ``osf_S_low`` [r] and ``osf_V_low`` [r, in]; the base's own singular vectors stay."""

    name = "osf"
    peft_type = "OSF"
    config_class = OSFConfig
    found_in_base = True

    def plan(self, config: OSFConfig, site: str, kind: Kind) -> OsfPlan:
        check_linear("OSF", site, kind)
        most, asked = min(kind.in_features, kind.out_features), config.effective_rank
        if asked is None:
            stay = most // 2
        else:
            stay = min(most, int(most * asked if isinstance(asked, float) and asked <= 1 else asked))
        if not 0 < stay < most:
            raise AdapterError(
                f"{site}: effective_rank: expected some of its weight's {most} singular vectors to stay, and some to "
                f"be trained, found {stay} of them"
            )
        return OsfPlan(kind, min(2 * (most - stay), most), 1.0, stay=stay, trained=most - stay)

    def shapes(self, config: OSFConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, OsfPlan)
        into, out = plan.kind.in_features, plan.kind.out_features
        own: tuple[tuple[int, ...], ...] = ((out, plan.trained), (plan.trained,), (plan.trained, into))
        shapes = dict(zip((*TRAINED, *FIRST), (*own, *own), strict=True))
        shapes |= {KEPT[0]: (out, plan.stay)} if out > into else {}
        return shapes | ({KEPT[1]: (plan.stay, into)} if into > out else {})

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: f"osf_svd_params.{name.removeprefix('osf_')}" for name in TRAINED}

    def frozen(self, config: OSFConfig) -> Collection[str]:
        return (*FIRST, *KEPT)

    def initialise(self, config: OSFConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        self.restore(config, plan, parameters, base)
        for name, first in zip(TRAINED, FIRST, strict=True):
            if config.init_weights is False:
                nn.init.normal_(parameters[name])
            else:
                parameters[name].copy_(parameters[first])

    def restore(self, config: OSFConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """As PEFT when it loads: the base's weight is decomposed again."""
        assert isinstance(plan, OsfPlan)
        u, s, v = torch.linalg.svd(base.weight(), full_matrices=False)
        stay = plan.stay
        found = dict(zip((*FIRST, *KEPT), (u[:, stay:], s[stay:], v[stay:], u[:, :stay], v[:stay]), strict=True))
        for name in parameters.keys() & found.keys():
            parameters[name].copy_(found[name])

    def rewrite(self, name: str, config: OSFConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"osf:{name}", osf, site.operands(name, (*TRAINED, *FIRST, *KEPT)))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        own = exact({name: parameters[name] for name in (*TRAINED, *FIRST)})
        a, b = factors(*own.values())
        return SlotValues(a, b.t(), torch.ones(len(a))) if len(a) == plan.rank else full_rank(b @ a, 1.0)

    def kept(self, config: OSFConfig, plan: SitePlan) -> Kept:
        assert isinstance(plan, OsfPlan)
        return Kept(own=2 * plan.trained)

    def scales(self, config: OSFConfig) -> bool:
        return False
