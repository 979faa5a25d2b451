"""HRA (https://arxiv.org/abs/2405.17484): the input is reflected r times, each time at a trained hyperplane.

    y = base(H x),    H = H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T / |u_i|^2

The product of r reflections is ``I - U T U^T`` with a triangular T [r, r] (the compact WY form), so that ``W H - W`` is
a LoRA: A is U, and B is ``-W U T``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

VECTORS = "hra_u"


@dataclass
class HRAConfig(AdapterConfig):
    """Names and defaults of ``peft.HRAConfig``.

    Args:
        r: how many reflections; start with an even number, whose pairs undo each other.
        apply_GS: make the vectors orthogonal to each other first (Gram-Schmidt).
        init_weights: pairs of equal vectors, which change nothing; ``False``, or an odd ``r``: at random.
        bias: ``"hra_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"

    peft_type: ClassVar[str] = "HRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")


@dataclass(frozen=True)
class HraPlan(SitePlan):
    """``orthogonal``: whether the vectors are made so first."""

    orthogonal: bool = False


@one_node
def directions(vectors: Tensor) -> Tensor:
    """A of the update, ``[r, in * kernel]``: the vectors ``[in * kernel, r]`` of length one, in float32 or wider."""
    exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    units: Tensor = (exact / exact.norm(dim=0)).t()
    return units


@one_node
def reflected(units: Tensor, weight: Tensor, orthogonal: bool) -> Tensor:
    """Rank-first B of the update, ``[r, out]``.

    Args:
        units: ``[r, in * kernel]``. weight: ``[out, in, *kernel]``.
        orthogonal: reflect at what Gram-Schmidt makes of the vectors: twice the projection on what they span.
    """
    products = units @ units.t()
    # T is the inverse of the triangle; half of a projection's is its whole matrix
    triangle = products / 2 if orthogonal else products.triu(1) + torch.eye(len(products)).to(units) / 2
    rows: Tensor = -(weight.flatten(1).detach().type_as(units) @ units.t() @ torch.linalg.inv(triangle)).t()
    return rows


def hra(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, hra_u: Tensor, weight: Tensor, orthogonal: bool
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    units = directions(hra_u)
    a = units.type_as(hra_u).unflatten(1, kind.a_shape(1)[1:])  # type: ignore[no-untyped-call]
    rows = reflected(units, weight, orthogonal).type_as(hra_u)
    out: Tensor = (y + kind.expand_rows(kind.reduce(x, a), rows)).type_as(y)
    return out


@functools.lru_cache(maxsize=2)
def _of(orthogonal: bool) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(hra, orthogonal=orthogonal)


class Hra(Method[HRAConfig]):
    """The parameter ``hra_u`` [in * kernel, r]."""

    name = "hra"
    peft_type = "HRA"
    config_class = HRAConfig
    alone = "HRA adapter"  # of two the product is the update, and not the sum
    follows_base = True

    def plan(self, config: HRAConfig, site: str, kind: Kind) -> HraPlan:
        if not kind.is_linear and (len(kind.kernel) != 2 or kind.groups > 1 or not kind.like_target):
            raise AdapterError(
                f"{site}: HRA adapts linear layers and conv2d without groups, as in PEFT, found {kind}; leave the site "
                "out"
            )
        return HraPlan(kind, config.r, 1.0, config.apply_GS)

    def shapes(self, config: HRAConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {VECTORS: (math.prod(plan.kind.a_shape(1)), plan.rank)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {VECTORS: VECTORS}

    def initialise(self, config: HRAConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        vectors = parameters[VECTORS]
        if not config.init_weights or plan.rank % 2:
            nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
        else:
            half = vectors.new_zeros(len(vectors), plan.rank // 2)
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
            vectors.copy_(half.repeat_interleave(2, dim=1))

    def rewrite(self, name: str, config: HRAConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"hra:{name}", _of(config.apply_GS), site.operands(name, (VECTORS,)), reads=("weight",))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, HraPlan)
        a = directions(parameters[VECTORS])
        b = reflected(a, base.weight().to(a.device), plan.orthogonal)
        return SlotValues(a.reshape(plan.kind.a_shape(plan.rank)), b, torch.ones(plan.rank))

    def kept(self, config: HRAConfig, plan: SitePlan) -> Kept:
        return Kept(own=plan.rank)

    def scales(self, config: HRAConfig) -> bool:
        return False
