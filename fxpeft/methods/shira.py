"""SHiRA (https://arxiv.org/abs/2406.13175): single entries of the weight are trained, at random places.

    y = base(x) + S x,    S zero but at r (in + out) places

of full rank: a slot takes as many ranks as the weight's smaller side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import applied, exact, full_rank, outside, scattered
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

ENTRIES, PLACES = "shira_weight", "shira_indices"


@dataclass
class ShiraConfig(AdapterConfig):
    """Names and defaults of ``peft.ShiraConfig``.

    Args:
        r: as many entries are trained as a LoRA of that rank has.
        mask_type: ``"random"``; a file's adapter has its places, whatever made them.
        random_seed: what the places follow from; ``None`` is a seed too, as in PEFT.
        init_weights: start as zeros; ``False``: normal.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's SHiRA
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "SHIRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")


@one_node
def sparse(entries: Tensor, places: Tensor, out: int, into: int) -> Tensor:
    """The update ``[out, in]`` of entries ``[n]`` at rows and columns ``[2, n]``."""
    return scattered(entries, places[0].long() * into + places[1], out, into)


def shira(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    shira_weight: Tensor,
    shira_indices: Tensor,
    scaling: Tensor,
) -> Tensor:
    """The training subgraph."""
    entries = (shira_weight * scaling).type_as(shira_weight)
    return applied(kind, base, x, sparse(entries, shira_indices, kind.out_features, kind.in_features), None)


class Shira(Method[ShiraConfig]):
    """The parameter ``shira_weight`` [n], and ``shira_indices`` [2, n], which stay."""

    name = "shira"
    peft_type = "SHIRA"
    config_class = ShiraConfig
    integers = (PLACES,)

    def plan(self, config: ShiraConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("SHiRA", site, kind)
        size, count = kind.in_features * kind.out_features, config.r * (kind.in_features + kind.out_features)
        if count > size:
            raise AdapterError(f"{site}: r: {config.r} trains {count} entries, and its weight has {size}")
        return SitePlan(kind, count, 1.0)

    def shapes(self, config: ShiraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {ENTRIES: (plan.rank,), PLACES: (2, plan.rank)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (ENTRIES, PLACES)}

    def untrained(self, config: ShiraConfig) -> Collection[str]:
        return (PLACES,)

    def initialise(self, config: ShiraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        if config.mask_type != "random":
            raise AdapterError(f"mask_type: expected 'random' for a new adapter, found {config.mask_type!r}")
        nn.init.zeros_(parameters[ENTRIES]) if config.init_weights else nn.init.normal_(parameters[ENTRIES])
        generator, into = torch.Generator(), plan.kind.in_features
        if config.random_seed is not None:
            generator.manual_seed(config.random_seed)
        drawn = torch.randperm(into * plan.kind.out_features, generator=generator)[: plan.rank].sort().values
        parameters[PLACES].copy_(torch.stack([drawn // into, drawn % into]))

    def stored(
        self, config: ShiraConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {**parameters, PLACES: parameters[PLACES].int()}  # as PEFT

    def read(self, config: ShiraConfig, tensors: dict[str, Tensor]) -> tuple[ShiraConfig, dict[str, Tensor]]:
        """On Windows PEFT writes the places as floats."""
        floats = (key for key, t in tensors.items() if key.endswith(f".{PLACES}") and t.dtype == torch.float32)
        return config, {**tensors, **{key: tensors[key].long() for key in floats}}

    def why_unfit(self, config: ShiraConfig, plan: SitePlan, parameters: Mapping[str, Tensor]) -> str | None:
        sizes = plan.kind.out_features, plan.kind.in_features
        wrong = any(outside(own, size) for own, size in zip(parameters[PLACES], sizes, strict=True))
        return f"{PLACES}: expected places in {list(sizes)}, found others" if wrong else None

    def rewrite(self, name: str, config: ShiraConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"shira:{name}", shira, site.operands(name, (ENTRIES, PLACES, "scaling")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        kind, entries = plan.kind, exact({ENTRIES: parameters[ENTRIES]})[ENTRIES]
        return full_rank(sparse(entries, parameters[PLACES], kind.out_features, kind.in_features), plan.scaling)

    def kept(self, config: ShiraConfig, plan: SitePlan) -> Kept:
        return Kept()
