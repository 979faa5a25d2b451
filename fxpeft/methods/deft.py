"""DEFT, as PEFT has it: what the weight does in a few directions of its output is taken out, and made anew.

    y = base(x) + Q (s R dropout(x) - P^T W x)

with P and Q from one trained matrix M: ``relu(M)`` and M, or both M's orthogonal factor. It is a LoRA whose B is Q, and
whose A is ``s R - P^T W``. ``para`` makes nothing anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

DIRECTIONS, ANEW = "deft_P", "deft_R"


@dataclass
class DeftConfig(AdapterConfig):
    """Names and defaults of ``peft.DeftConfig``.

    Args:
        r: how many directions, as many as there are outputs at most.
        decomposition_method: ``"relu"``: what is taken out is the trained matrix times its positive part; ``"qr"``: the
            projection on what its columns span.
        alpha: R is scaled by ``alpha / r``; ``None``: it isn't. para: there is no R.
        deft_dropout: on R's input while training.
        init_weights: R starts as what is taken out; ``False``: at random, with the deviation ``0.02 * init_scale``.
        bias: ``"deft_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    bias: Literal["none", "all", "deft_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "DEFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("deft_dropout")


@dataclass(frozen=True)
class DeftPlan(SitePlan):
    """``orthogonal``: whether the directions are made so."""

    orthogonal: bool = False


@one_node
def directions(matrix: Tensor, orthogonal: bool) -> Tensor:
    """Q ``[out, r]`` in float32 or wider."""
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return torch.linalg.qr(exact)[0] if orthogonal else exact


@one_node
def taken_out(q: Tensor, weight: Tensor, orthogonal: bool) -> Tensor:
    """``P^T W``, ``[r, in]``."""
    return (q if orthogonal else q.relu()).t() @ weight.detach().type_as(q)


def deft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    deft_P: Tensor,
    weight: Tensor,
    scaling: Tensor,
    orthogonal: bool,
    deft_R: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    q = directions(deft_P, orthogonal)
    h = -kind.reduce(x, taken_out(q, weight, orthogonal))
    if deft_R is not None:
        x = x.type_as(q)
        h = h + kind.reduce(x if dropout is None else dropout(x), deft_R.type_as(q)) * scaling
    out: Tensor = (y + kind.expand(h, q)).type_as(y)
    return out


@functools.lru_cache(maxsize=2)
def _of(orthogonal: bool) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(deft, orthogonal=orthogonal)


class Deft(Method[DeftConfig]):
    """Parameters ``deft_P`` [out, r] and, without ``para``, ``deft_R`` [r, in]."""

    name = "deft"
    peft_type = "DEFT"
    config_class = DeftConfig
    follows_base = True

    def plan(self, config: DeftConfig, site: str, kind: Kind) -> DeftPlan:
        check_linear("DEFT", site, kind)
        rank = min(config.r, kind.out_features)
        return DeftPlan(kind, rank, (config.alpha or rank) / rank, config.decomposition_method == "qr")

    def shapes(self, config: DeftConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {DIRECTIONS: (plan.kind.out_features, plan.rank)}
        return shapes if config.para else {**shapes, ANEW: (plan.rank, plan.kind.in_features)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (DIRECTIONS, ANEW)}

    def initialise(self, config: DeftConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        assert isinstance(plan, DeftPlan)
        nn.init.normal_(parameters[DIRECTIONS], std=0.02)
        if config.para:
            return
        if config.init_weights:
            q = directions(parameters[DIRECTIONS], plan.orthogonal)
            parameters[ANEW].copy_(taken_out(q, base.weight().to(q), plan.orthogonal) / plan.scaling)
        else:
            nn.init.normal_(parameters[ANEW], std=0.02 * config.init_scale)

    def dropout(self, config: DeftConfig, kind: Kind) -> float:
        return config.deft_dropout

    def rewrite(self, name: str, config: DeftConfig, site: SiteAdapter) -> Rewrite:
        held = site.operands(name, (DIRECTIONS, ANEW, "scaling", "dropout"))
        return Rewrite(f"deft:{name}", _of(config.decomposition_method == "qr"), held, reads=("weight",))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, DeftPlan)
        q = directions(parameters[DIRECTIONS], plan.orthogonal)
        a = -taken_out(q, base.weight().to(q.device), plan.orthogonal)
        if ANEW in parameters:
            a = a + parameters[ANEW].type_as(a) * plan.scaling
        return SlotValues(a, q.t(), torch.ones(plan.rank))

    def kept(self, config: DeftConfig, plan: SitePlan) -> Kept:
        return Kept(own=2 * plan.rank)

    def scales(self, config: DeftConfig) -> bool:
        return False
