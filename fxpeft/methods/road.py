"""RoAd (https://arxiv.org/abs/2409.00119): pairs of a target's outputs are rotated and scaled.

    y = R base(x),    R = [[a cos t, -a sin t], [a sin t, a cos t]] for each pair

of full rank: a slot takes as many ranks as the weight's smaller side, and a shift for the bias that is rotated too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

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

ANGLES, SCALES = "road_theta", "road_alpha"
SIZES = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers for each pair


@dataclass
class RoadConfig(AdapterConfig):
    """Names and defaults of ``peft.RoadConfig``.

    Args:
        variant: ``"road_1"``: one angle and scale for each pair; ``"road_2"``: for each output; ``"road_4"``: two.
        group_size: of each group of so many outputs the first half is paired with the second; it divides the outputs.
        init_weights: start with no rotation; ``False``: at random.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's RoAd
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "ROAD"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("group_size")
        if self.group_size % 2:
            raise AdapterError(f"group_size: expected an even number, found {self.group_size}")


@dataclass(frozen=True)
class RoadPlan(SitePlan):
    """``group``: size of a group. ``numbers``: for each pair."""

    group: int = 2
    numbers: int = 1


@one_node
def turned(y: Tensor, angles: Tensor, scales: Tensor, group: int, numbers: int) -> Tensor:
    """``[..., out]`` rotated."""
    if numbers == 4:
        (cos, sin), (own, other) = (each.view(-1, 2, group).unbind(1) for each in (angles, scales))
    else:
        halves = group // 2 if numbers == 1 else group
        cos = sin = angles.view(-1, 1, halves).expand(-1, 3 - numbers, -1)
        own = other = scales.view(-1, 1, halves).expand(-1, 3 - numbers, -1)
    pairs = y.unflatten(-1, (-1, 2, group // 2))  # type: ignore[no-untyped-call]
    across = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), -2).flatten(-3)
    return y * (own * cos.cos()).flatten() + across * (other * sin.sin()).flatten()


def road(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    road_theta: Tensor,
    road_alpha: Tensor,
    group: int,
    numbers: int,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    out: Tensor = turned(y.type_as(road_theta), road_theta, road_alpha, group, numbers).type_as(y)
    return out


@functools.lru_cache(maxsize=64)
def _of(group: int, numbers: int) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(road, group=group, numbers=numbers)


class Road(Method[RoadConfig]):
    """Parameters ``road_theta`` and ``road_alpha``, of half as many numbers as outputs, as many, or twice as many."""

    name = "road"
    peft_type = "ROAD"
    needs: ClassVar = {"road": ("g_out", "shift")}
    config_class = RoadConfig
    alone = "RoAd adapter"
    follows_base = True

    def plan(self, config: RoadConfig, site: str, kind: Kind) -> RoadPlan:
        check_linear("RoAd", site, kind)
        if kind.out_features % config.group_size:
            raise AdapterError(f"{site}: group_size {config.group_size} doesn't divide its {kind.out_features} outputs")
        return RoadPlan(kind, 0, 1.0, group=config.group_size, numbers=SIZES[config.variant])

    def shapes(self, config: RoadConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        size = plan.kind.out_features * SIZES[config.variant] // 2
        return {ANGLES: (size,), SCALES: (size,)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (ANGLES, SCALES)}

    def initialise(self, config: RoadConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        spread = 0.0 if config.init_weights else 0.5
        nn.init.normal_(parameters[ANGLES], 0.0, spread)
        nn.init.normal_(parameters[SCALES], 1.0, spread)

    def rewrite(self, name: str, config: RoadConfig, site: SiteAdapter) -> Rewrite:
        plan = site.plan
        assert isinstance(plan, RoadPlan)
        return Rewrite(f"road:{name}", _of(plan.group, plan.numbers), site.operands(name, (ANGLES, SCALES)))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        """A gain of ones says that other adapters can't go beside it: of what they add it makes something else."""
        assert isinstance(plan, RoadPlan)
        angles, scales = exact({name: parameters[name] for name in (ANGLES, SCALES)}).values()
        bias, columns = base.bias(), base.weight().to(angles).t()
        rest = (angles, scales, plan.group, plan.numbers)
        shift = torch.zeros_like(columns[0]) if bias is None else turned(bias.to(angles), *rest) - bias.to(angles)
        whole = full_rank((turned(columns, *rest) - columns).t(), 1.0)
        return whole._replace(g_out=torch.ones_like(shift), shift=shift)

    def kept(self, config: RoadConfig, plan: SitePlan) -> Kept:
        return Kept(input=False, outputs=1)

    def scales(self, config: RoadConfig) -> bool:
        return False
