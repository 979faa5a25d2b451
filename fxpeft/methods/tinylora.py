"""TinyLoRA (https://arxiv.org/abs/2602.04118): a few trained numbers between the weight's first singular vectors.

    y = base(x) + B R A dropout(x),    R = sum over i of v[i] P[i]

with ``B A`` the weight's part of rank r, P random and fixed, and v trained; sites in groups of neighbours share one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import exact
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

VECTOR, PROJECTION, GROUP, FACTORS = "tinylora_v", "tinylora_P", "tinylora_group", ("tinylora_A", "tinylora_B")
VECTOR_KEY = re.compile(rf"base_model\.{VECTOR}\.(\d{{1,9}})")


@dataclass
class TinyLoraConfig(AdapterConfig):
    """Names and defaults of ``peft.TinyLoraConfig``.

    Args:
        r: of how many singular vectors, as many as the weight has at most. u: how many numbers v has.
        weight_tying: from 0.0, where each site has its own v, to 1.0, where all share one.
        projection_seed: what P follows from, with the site's place. save_projection: write P into the file too.
        init_weights: v starts as zeros; ``"uniform"``: within ``init_v_bound``, and so with ``False``, where PEFT's is
            whatever lay in memory.
        tinylora_dropout: on the update's input while training.
        bias: ``"tinylora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's TinyLoRA

    peft_type: ClassVar[str] = "TINYLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "u")
        self.check_probability("tinylora_dropout")
        if not 0 <= self.weight_tying <= 1:
            raise AdapterError(f"weight_tying: expected a number from 0 to 1, found {self.weight_tying}")


@dataclass(frozen=True)
class TinyLoraPlan(SitePlan):
    """``place``: of the site among all. ``group``: whose v it has."""

    place: int = 0
    group: int = 0


@one_node
def between(vectors: Tensor, group: Tensor, projection: Tensor) -> Tensor:
    """R ``[r, r]`` of all groups' v ``[groups, u]``, which come to where the site is, its own one, and P."""
    vector = vectors.to(group.device).index_select(0, group).squeeze(0)
    return torch.einsum("i,ijk->jk", vector, projection.to(vector))


def tinylora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tinylora_v: Tensor,
    tinylora_A: Tensor,
    tinylora_B: Tensor,
    tinylora_P: Tensor,
    tinylora_group: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    r = between(tinylora_v, tinylora_group, tinylora_P).type_as(tinylora_A)
    if kind.looks_up:
        h = kind.reduce(x, tinylora_B.t())
        update = kind.expand(kind.expand(h if dropout is None else dropout(h), r.t()), tinylora_A.t())
    else:
        x = x.type_as(tinylora_A)
        update = kind.expand(kind.expand(kind.reduce(x if dropout is None else dropout(x), tinylora_A), r), tinylora_B)
    out: Tensor = (y + update).type_as(y)
    return out


class TinyLora(Method[TinyLoraConfig]):
    """``tinylora_v`` [groups, u], which all sites share; A, B, ``tinylora_P`` [u, r, r], ``tinylora_group`` [1] stay.

    A is [r, in] and B [out, r], as PEFT has them; of an embedding A is [r, out] and B [in, r].
    """

    name = "tinylora"
    peft_type = "TINYLORA"
    config_class = TinyLoraConfig
    shared_keys: ClassVar[Mapping[str, str]] = {VECTOR: f"base_model.{VECTOR}"}
    ordered = True
    integers = (GROUP,)

    def plan(self, config: TinyLoraConfig, site: str, kind: Kind) -> TinyLoraPlan:
        if not (kind.is_linear or kind.looks_up):
            raise AdapterError(
                f"{site}: TinyLoRA adapts linear layers and embeddings, found {kind}; leave the site out"
            )
        return TinyLoraPlan(kind, min(config.r, kind.in_features, kind.out_features), 1.0)

    def arranged(self, config: TinyLoraConfig, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        groups = max(1, round(len(plans) * (1.0 - config.weight_tying)))
        size = max(1, len(plans) // groups)
        return {
            site: TinyLoraPlan(plan.kind, plan.rank, 1.0, place=place, group=min(place // size, groups - 1))
            for place, (site, plan) in enumerate(plans.items())
        }

    def shared(self, config: TinyLoraConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        return {VECTOR: (1 + max(_own(plan).group for plan in plans.values()), config.u)}

    def shared_trained(self, config: TinyLoraConfig) -> Collection[str]:
        return (VECTOR,)

    def initialise_shared(self, config: TinyLoraConfig, shared: Mapping[str, Tensor]) -> None:
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        nn.init.uniform_(shared[VECTOR], -bound, bound)

    def shapes(self, config: TinyLoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        r, into, out = plan.rank, plan.kind.in_features, plan.kind.out_features
        into, out = (out, into) if plan.kind.looks_up else (into, out)
        return {**dict(zip(FACTORS, ((r, into), (out, r)), strict=True)), PROJECTION: (config.u, r, r), GROUP: (1,)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (*FACTORS, PROJECTION)}

    def frozen(self, config: TinyLoraConfig) -> Collection[str]:
        return (GROUP,) if config.save_projection else (GROUP, PROJECTION)

    def untrained(self, config: TinyLoraConfig) -> Collection[str]:
        return (*FACTORS, PROJECTION) if config.save_projection else FACTORS

    def initialise(self, config: TinyLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        weight = base.weight()
        u, s, vh = torch.linalg.svd(weight.t() if plan.kind.looks_up else weight, full_matrices=False)
        roots = s[: plan.rank].sqrt()
        parameters[FACTORS[0]].copy_(roots.unsqueeze(1) * vh[: plan.rank])
        parameters[FACTORS[1]].copy_(u[:, : plan.rank] * roots)
        self._follow(config, plan, parameters, (GROUP, PROJECTION))

    def restore(self, config: TinyLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        self._follow(config, plan, parameters, self.frozen(config))

    def _follow(
        self, config: TinyLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], names: Collection[str]
    ) -> None:
        """Fill in what follows from the site's place and the seed."""
        own, r = _own(plan), plan.rank
        parameters[GROUP].fill_(own.group)
        if PROJECTION in names:
            generator = torch.Generator().manual_seed(config.projection_seed + own.place)
            drawn = torch.normal(mean=0.0, std=1.0 / r**0.5, size=(config.u, r, r), generator=generator)
            parameters[PROJECTION].copy_(drawn)

    def stored_shared(self, config: TinyLoraConfig, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"base_model.{VECTOR}.{group}": vector for group, vector in enumerate(shared[VECTOR])}

    def read(self, config: TinyLoraConfig, tensors: dict[str, Tensor]) -> tuple[TinyLoraConfig, dict[str, Tensor]]:
        vectors = {int(m[1]): tensors[key] for key in tensors if (m := VECTOR_KEY.fullmatch(key))}
        if not vectors:
            return config, tensors
        if sorted(vectors) != [*range(len(vectors))] or any(tuple(v.shape) != (config.u,) for v in vectors.values()):
            found = {f"{VECTOR}.{group}": list(v.shape) for group, v in sorted(vectors.items())[:4]}
            raise CheckpointError(f"base_model.{VECTOR}: expected vectors of u {config.u} from 0 on, found {found}")
        left = {key: tensor for key, tensor in tensors.items() if not VECTOR_KEY.fullmatch(key)}
        return config, {**left, self.shared_keys[VECTOR]: torch.stack([vectors[n] for n in range(len(vectors))])}

    def dropout(self, config: TinyLoraConfig, kind: Kind) -> float:
        return config.tinylora_dropout

    def rewrite(self, name: str, config: TinyLoraConfig, site: SiteAdapter) -> Rewrite:
        vectors = {f"{name}.shared.{VECTOR}": getattr(site.shared, VECTOR)}
        held = site.operands(name, (*FACTORS, PROJECTION, GROUP, "dropout"))
        return Rewrite(f"tinylora:{name}", tinylora, {**held, **vectors}, shared=tuple(vectors))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        own = exact({name: parameters[name] for name in (*FACTORS, PROJECTION)})
        r = between(base.shared[VECTOR].to(own[PROJECTION]), parameters[GROUP], own[PROJECTION])
        a, b = (own[name] for name in FACTORS)
        ranks = torch.ones(plan.rank)
        return SlotValues(b.t(), r @ a, ranks) if plan.kind.looks_up else SlotValues(a, (b @ r).t(), ranks)

    def kept(self, config: TinyLoraConfig, plan: SitePlan) -> Kept:
        return Kept(input=False, own=plan.rank)

    def scales(self, config: TinyLoraConfig) -> bool:
        return False


def _own(plan: SitePlan) -> TinyLoraPlan:
    assert isinstance(plan, TinyLoraPlan)
    return plan
