"""MiSS (https://arxiv.org/abs/2409.15371): inputs are summed over blocks of r, and a matrix makes outputs of the sums.

    y = base(x) + D^T sum_blocks(dropout(x)),    D [r, out]

which is a LoRA whose A is ones in a pattern. ``mini``: D is narrower, and repeats over the outputs. ``bat`` multiplies
the base's weight, in blocks ``[r, r]``, with a block for each r outputs, ``W' = W + W D_i + D_i``: of full rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import applied, full_rank
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

BLOCK = "miss_block"


@dataclass
class MissConfig(AdapterConfig):
    """Names and defaults of ``peft.MissConfig``.

    Args:
        r: how many sums, the rank. miss_dropout: on the update's input while training.
        init_weights: ``True``: zeros; ``False``: at random; ``"mini"``: zeros, ``mini_r`` columns that repeat;
            ``"bat"``: zeros, blocks ``[r, r]`` that multiply the base's weight (:class:`Bat`); PEFT
            drops nothing there.
        bias: ``"MiSS_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    bias: Literal["none", "all", "MiSS_only"] = "none"
    init_weights: bool | Literal["mini", "bat"] = True

    peft_type: ClassVar[str] = "MISS"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "mini_r")
        self.check_probability("miss_dropout")


def miss(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    miss_block: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    x = x.type_as(miss_block)
    out: Tensor = (y + update(x if dropout is None else dropout(x), miss_block, kind.out_features)).type_as(y)
    return out


@one_node
def update(x: Tensor, block: Tensor, outputs: int) -> Tensor:
    """``[..., in]`` to ``[..., outputs]``; the last block of inputs may be filled up with zeros."""
    r, columns = block.shape
    padded = F.pad(x, (0, -x.shape[-1] % r))
    return padded.reshape(*x.shape[:-1], -1, r).sum(-2) @ block.repeat(1, outputs // columns)


class Miss(Method[MissConfig]):
    """The parameter ``miss_block``, [r, out] or [r, mini_r]."""

    name = "miss"
    peft_type = "MISS"
    older_types = ("BONE",)  # PEFT 0.14 to 0.18
    config_class = MissConfig

    def plan(self, config: MissConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("MiSS", site, kind)
        if config.r > kind.in_features:
            raise AdapterError(f"{site}: r: expected at most its {kind.in_features} inputs, found {config.r}")
        if config.init_weights == "mini" and kind.out_features % config.mini_r:
            raise AdapterError(f"{site}: mini_r {config.mini_r} doesn't divide its {kind.out_features} outputs")
        return SitePlan(kind, config.r, 1.0)

    def shapes(self, config: MissConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {BLOCK: (plan.rank, config.mini_r if config.init_weights == "mini" else plan.kind.out_features)}

    def read(self, config: MissConfig, tensors: dict[str, Tensor]) -> tuple[MissConfig, dict[str, Tensor]]:
        """A file of Bone's is MiSS' with another name for the block."""
        return config, {re.sub(r"\.bone_block$", f".{BLOCK}", key): tensor for key, tensor in tensors.items()}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {BLOCK: BLOCK}

    def initialise(self, config: MissConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        if config.init_weights:
            nn.init.zeros_(parameters[BLOCK])
        else:
            nn.init.kaiming_uniform_(parameters[BLOCK], a=math.sqrt(5))

    def dropout(self, config: MissConfig, kind: Kind) -> float:
        return config.miss_dropout

    def rewrite(self, name: str, config: MissConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"miss:{name}", miss, site.operands(name, (BLOCK, "dropout")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        kind, block = plan.kind, parameters[BLOCK]
        blocks = -(-kind.in_features // plan.rank)
        a = torch.eye(plan.rank).to(block).repeat(1, blocks)[:, : kind.in_features]
        return SlotValues(a, block.repeat(1, kind.out_features // block.shape[1]), torch.ones(plan.rank))

    def scales(self, config: MissConfig) -> bool:
        return False


def bat(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, miss_block: Tensor, weight: Tensor) -> Tensor:
    """The training subgraph of ``bat``."""
    return applied(kind, base, x, products(miss_block, weight.detach().type_as(miss_block)), None)


@one_node
def products(blocks: Tensor, weight: Tensor) -> Tensor:
    """The update ``[out, in]``; ``blocks``: ``[out / r, r, r]``."""
    r = blocks.shape[2]
    parts = weight.unflatten(0, (-1, r)).unflatten(2, (-1, r)).transpose(1, 2)  # type: ignore[no-untyped-call]
    made: Tensor = (parts @ blocks.unsqueeze(1) + blocks.unsqueeze(1)).transpose(1, 2).reshape(weight.shape)
    return made


class Bat(Miss):
    """The parameter ``miss_block``, [out / r, r, r]."""

    name = "miss_bat"
    variant: ClassVar = {"init_weights": "bat"}
    follows_base = True
    alone = "MiSS adapter with 'bat'"  # PEFT's second one multiplies what the first one made

    def takes(self, config: AdapterConfig) -> bool:
        return isinstance(config, MissConfig) and config.init_weights == "bat"

    def plan(self, config: MissConfig, site: str, kind: Kind) -> SitePlan:
        plan = super().plan(config, site, kind)
        if kind.in_features % config.r or kind.out_features % config.r:
            raise AdapterError(
                f"{site}: init_weights='bat': expected an r that divides its {kind.in_features} inputs and "
                f"{kind.out_features} outputs, found {config.r}"
            )
        return plan

    def shapes(self, config: MissConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {BLOCK: (plan.kind.out_features // plan.rank, plan.rank, plan.rank)}

    def dropout(self, config: MissConfig, kind: Kind) -> float:
        return 0.0

    def rewrite(self, name: str, config: MissConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"miss_bat:{name}", bat, site.operands(name, (BLOCK,)), reads=("weight",))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        block = parameters[BLOCK].to(torch.promote_types(parameters[BLOCK].dtype, torch.float32))
        return full_rank(products(block, base.weight().to(block)), 1.0)

    def kept(self, config: MissConfig, plan: SitePlan) -> Kept:
        return Kept()
