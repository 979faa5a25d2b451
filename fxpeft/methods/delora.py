"""DeLoRA (https://arxiv.org/abs/2503.18225): a LoRA whose update has a trained bound, whatever its factors' lengths.

    y = base(x) + B diag(lambda / r / (|A_i| |B_i|)) A (w * dropout(x))

with ``w`` the norms of the base's columns, which come with the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.one_node import one_node

NAMES, NORM = ("delora_A", "delora_B", "delora_lambda"), "delora_w_norm"
LEAST = 1e-4  # no factor's length counts as less


@dataclass
class DeloraConfig(AdapterConfig):
    """Names and defaults of ``peft.DeloraConfig``.

    Args:
        r: rank. delora_lambda: what the bound starts as. rank_pattern, lambda_pattern: name suffix or regular
            expression -> the site's own value.
        module_dropout: on the update's input while training, as PEFT applies it.
        init_weights: start with no update; ``False``: at random.
        bias: ``"delora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
    """

    r: int = 8
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, int | float] = field(default_factory=dict)

    peft_type: ClassVar[str] = "DELORA"
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "lambda_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "rank_pattern")
        self.check_probability("module_dropout")


@dataclass(frozen=True)
class DeloraPlan(SitePlan):
    """``bound``: what lambda starts as."""

    bound: float = 15


@one_node
def scales(a: Tensor, b: Tensor, bound: Tensor) -> Tensor:
    """What each rank of A ``[r, in]`` and B ``[out, r]`` is multiplied with, ``[r]``."""
    lengths = a.norm(dim=1).clamp(min=LEAST) * b.norm(dim=0).clamp(min=LEAST)
    scale: Tensor = bound / a.shape[0] / lengths
    return scale


def delora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    delora_A: Tensor,
    delora_B: Tensor,
    delora_lambda: Tensor,
    delora_w_norm: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    dropped = x.type_as(delora_A) if dropout is None else dropout(x.type_as(delora_A))
    h = kind.reduce(dropped * delora_w_norm, delora_A)
    out: Tensor = (y + kind.expand(h * scales(delora_A, delora_B, delora_lambda), delora_B)).type_as(y)
    return out


class Delora(Method[DeloraConfig]):
    """Parameters ``delora_A`` [r, in], ``delora_B`` [out, r], ``delora_lambda`` [1]; ``delora_w_norm`` [in] stays."""

    name = "delora"
    peft_type = "DELORA"
    config_class = DeloraConfig

    def plan(self, config: DeloraConfig, site: str, kind: Kind) -> DeloraPlan:
        check_linear("DeLoRA", site, kind)
        rank = pattern_value(config.rank_pattern, site, config.r)
        bound = pattern_value(config.lambda_pattern, site, config.delora_lambda, "lambda_pattern")
        return DeloraPlan(kind, rank, 1.0, bound)

    def shapes(self, config: DeloraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        into, out = plan.kind.in_features, plan.kind.out_features
        shapes: tuple[tuple[int, ...], ...] = ((plan.rank, into), (out, plan.rank), (1,), (into,))
        return dict(zip((*NAMES, NORM), shapes, strict=True))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (*NAMES, NORM)}

    def initialise(self, config: DeloraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        assert isinstance(plan, DeloraPlan)
        nn.init.kaiming_uniform_(parameters["delora_A"], a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(parameters["delora_B"])
        else:
            nn.init.kaiming_uniform_(parameters["delora_B"], a=math.sqrt(5))
        parameters["delora_lambda"].fill_(float(plan.bound))
        parameters[NORM].copy_(torch.linalg.vector_norm(base.weight(), dim=0))

    def untrained(self, config: DeloraConfig) -> Collection[str]:
        return (NORM,)

    def dropout(self, config: DeloraConfig, kind: Kind) -> float:
        return config.module_dropout

    def rewrite(self, name: str, config: DeloraConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"delora:{name}", delora, site.operands(name, (*NAMES, NORM, "dropout")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b, bound = (parameters[name] for name in NAMES)
        return SlotValues(a * parameters[NORM], b.t(), scales(a.float(), b.float(), bound.float()))

    def kept(self, config: DeloraConfig, plan: SitePlan) -> Kept:
        return Kept(own=2 * plan.rank + plan.kind.in_features)

    def scales(self, config: DeloraConfig) -> bool:
        return False
