"""BD-LoRA: a LoRA whose A or B is block-diagonal, for engines that shard it. It lowers to the LoRA that it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.blocks import unblocked
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import Lora, LoraConfig, lora
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind


@dataclass(frozen=True)
class BlockPlan(SitePlan):
    """A site's plan, with how many blocks A and B are of."""

    blocks: tuple[int, int] = field(default=(1, 1), kw_only=True)


def bdlora(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, blocks: tuple[int, int], lora_A: Tensor, lora_B: Tensor,
    **operands: Any,
) -> Tensor:  # fmt: skip
    """The training subgraph."""
    return lora(kind, base, x, lora_A=unblocked(lora_A, blocks[0]), lora_B=unblocked(lora_B, blocks[1]), **operands)


class BdLora(Lora):
    """LoRA's parameters, where a block-diagonal one holds its blocks alone."""

    name = "bdlora"
    variant: ClassVar = {"use_bdlora": ...}
    needs: ClassVar = {"lora": ()}

    def takes(self, config: AdapterConfig) -> bool:
        return isinstance(config, LoraConfig) and config.use_bdlora is not None

    def declared(self, config: LoraConfig) -> str:
        return Lora.name

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> BlockPlan:
        if not kind.is_linear:
            raise AdapterError(f"{site}: use_bdlora is for linear layers, as in PEFT, found {kind}; leave the site out")
        assert config.use_bdlora is not None
        plan, blocks = super().plan(config, site, kind), config.use_bdlora.blocks(site)
        sides = (plan.rank, kind.in_features), (kind.out_features, plan.rank)
        for (one, other), count in zip(sides, blocks, strict=True):
            if one % count or other % count:
                raise AdapterError(f"{site}: use_bdlora.nblocks: {count} blocks don't divide {one} x {other}")
        return BlockPlan(plan.kind, plan.rank, plan.scaling, blocks=blocks)

    def shapes(self, config: LoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, BlockPlan)
        of_a, of_b = plan.blocks
        rank, kind = plan.rank, plan.kind
        return {"lora_A": (rank, kind.in_features // of_a), "lora_B": (kind.out_features, rank // of_b)}

    def initialise(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        super().initialise(config, plan, parameters, base)
        assert isinstance(plan, BlockPlan)
        if plan.blocks[0] > 1:
            nn.init.kaiming_uniform_(parameters["lora_A"])
        if plan.blocks[1] > 1:
            nn.init.zeros_(parameters["lora_B"])

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        assert isinstance(site.plan, BlockPlan)
        held = site.operands(name, ("lora_A", "lora_B", "scaling", "dropout"))
        return Rewrite(f"bdlora:{name}", subgraph(site.plan.blocks), held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, BlockPlan)
        parts = zip(("lora_A", "lora_B"), plan.blocks, strict=True)
        full = {name: unblocked(parameters[name], count) for name, count in parts}
        return super().lower(plan, full, base)

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in parameters.items()}


@functools.lru_cache(maxsize=64)
def subgraph(blocks: tuple[int, int]) -> Callable[..., Any]:
    """The training subgraph for so many blocks: one function for all sites of them, by which generated code is kept."""
    return functools.partial(bdlora, blocks=blocks)
