"""Super-Tuning (https://arxiv.org/abs/2607.09287): the entries of the weight that are largest are trained, or smallest.

    y = base(x) + S x + alpha / r * B A dropout(x),    S zero but at these places

of full rank: a slot takes as many ranks as the weight's smaller side. The LoRA is there where ``r`` is (Supra).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import applied, exact, full_rank, outside, scattered
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

ENTRIES, PLACES = "supertuning_values", "supertuning_indices"
FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


@dataclass
class SupertuningConfig(AdapterConfig):
    """Names and defaults of ``peft.SupertuningConfig``.

    Args:
        sparsity: which part of the weight's entries is not trained. select_top: ``False``: the smallest are.
        r: rank of a LoRA beside them, if any. lora_alpha: it is scaled by ``lora_alpha / r``, by default by 2.
        lora_dropout: on the LoRA's input while training.
        init_weights: entries and B start as zeros; ``False``: at random.
        save_precomputed_indices: write the places into the file; else they are found again in the base.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's Super-Tuning
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "SUPERTUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("sparsity", "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            raise AdapterError(f"lora_alpha: expected None where r is None, found {self.lora_alpha}")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r


@dataclass(frozen=True)
class SupertuningPlan(SitePlan):
    """``entries``: how many. ``rank`` is the LoRA's, and ``scaling``, or zero."""

    entries: int = 0


def supertuning(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    supertuning_values: Tensor,
    supertuning_indices: Tensor,
    scaling: Tensor,
    supertuning_lora_A: Tensor | None = None,
    supertuning_lora_B: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    delta = scattered(supertuning_values, supertuning_indices, kind.out_features, kind.in_features)
    out = applied(kind, base, x, delta, None)
    if supertuning_lora_A is None or supertuning_lora_B is None:
        return out
    h = kind.reduce(x if dropout is None else dropout(x), supertuning_lora_A)
    return out + kind.scale(kind.expand(h, supertuning_lora_B), scaling).type_as(out)


class Supertuning(Method[SupertuningConfig]):
    """``supertuning_values`` [n], a LoRA's A and B, and ``supertuning_indices`` [n], counted through, which stay."""

    name = "supertuning"
    peft_type = "SUPERTUNING"
    config_class = SupertuningConfig
    found_in_base = True
    integers = (PLACES,)

    def plan(self, config: SupertuningConfig, site: str, kind: Kind) -> SupertuningPlan:
        check_linear("Super-Tuning", site, kind)
        size = kind.in_features * kind.out_features
        if (count := int(size * (1 - config.sparsity))) < 1:
            raise AdapterError(f"{site}: sparsity: {config.sparsity} leaves none of its weight's {size} entries")
        scaling = (config.lora_alpha or 0.0) / config.r if config.r else 1.0
        return SupertuningPlan(kind, config.r or 0, scaling, entries=count)

    def shapes(self, config: SupertuningConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, SupertuningPlan)
        shapes: dict[str, tuple[int, ...]] = {ENTRIES: (plan.entries,), PLACES: (plan.entries,)}
        factors = (plan.kind.a_shape(plan.rank), plan.kind.b_shape(plan.rank))
        return {**shapes, **dict(zip(FACTORS, factors, strict=True))} if plan.rank else shapes

    def keys(self, kind: Kind) -> dict[str, str]:
        return {ENTRIES: ENTRIES, PLACES: PLACES, **{name: f"{name}.weight" for name in FACTORS}}

    def frozen(self, config: SupertuningConfig) -> Collection[str]:
        return () if config.save_precomputed_indices else (PLACES,)

    def untrained(self, config: SupertuningConfig) -> Collection[str]:
        return (PLACES,) if config.save_precomputed_indices else ()

    def initialise(
        self, config: SupertuningConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base
    ) -> None:
        self.restore(config, plan, parameters, base)
        nn.init.zeros_(parameters[ENTRIES]) if config.init_weights else nn.init.normal_(parameters[ENTRIES])
        if plan.rank:
            a, b = (parameters[name] for name in FACTORS)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b) if config.init_weights else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def restore(self, config: SupertuningConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        sizes = base.weight().abs().flatten()
        parameters[PLACES].copy_(sizes.topk(len(parameters[PLACES]), largest=config.select_top).indices)

    def stored(
        self, config: SupertuningConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        kept = super().stored(config, site, plan, parameters)
        return {name: value.int() if name == PLACES else value for name, value in kept.items()}  # as PEFT

    def why_unfit(self, config: SupertuningConfig, plan: SitePlan, parameters: Mapping[str, Tensor]) -> str | None:
        size = plan.kind.in_features * plan.kind.out_features
        wrong = PLACES in parameters and outside(parameters[PLACES], size)
        return f"{PLACES}: expected places below {size}, found others" if wrong else None

    def dropout(self, config: SupertuningConfig, kind: Kind) -> float:
        return config.lora_dropout if config.r else 0.0

    def rewrite(self, name: str, config: SupertuningConfig, site: SiteAdapter) -> Rewrite:
        held = site.operands(name, (ENTRIES, PLACES, *FACTORS, "scaling", "dropout"))
        return Rewrite(f"supertuning:{name}", supertuning, held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        own = exact({name: value for name, value in parameters.items() if name != PLACES})
        delta = scattered(own[ENTRIES], parameters[PLACES], plan.kind.out_features, plan.kind.in_features)
        if plan.rank:
            delta = delta + own[FACTORS[1]] @ own[FACTORS[0]] * plan.scaling
        return full_rank(delta, 1.0)

    def kept(self, config: SupertuningConfig, plan: SitePlan) -> Kept:
        return Kept(own=plan.rank)

    def scales(self, config: SupertuningConfig) -> bool:
        return False
