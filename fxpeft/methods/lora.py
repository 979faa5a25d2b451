"""LoRA (https://arxiv.org/abs/2106.09685), with PEFT's options.

    y = base(x) + scale * B A dropout(x),    scale = alpha / r, or alpha / sqrt(r) with rsLoRA
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.config import RankConfig
from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.passes.inject import Rewrite
from fxpeft.passes.kinds import Kind
from fxpeft.passes.names import pattern_value


@dataclass
class LoraConfig(RankConfig):
    """LoRA's config: names and defaults of ``peft.LoraConfig``.

    Args:
        lora_dropout: on the update's input while training; not on embeddings (PEFT's rule).
        bias: ``"none"``; ``"lora_only"``: the sites' biases are trained with the adapter;
            ``"all"``: every bias of the model. Unlike PEFT the base's own biases stay untouched.
        init_lora_weights: ``True``: A uniform (Kaiming), B zero; ``"gaussian"``: A normal with
            deviation 1/r, B zero; ``False``: both random. Embeddings: A zero, B normal.
        lora_bias: B has a bias of its own.
        use_dora: train magnitude and direction apart; see :mod:`fxpeft.methods.dora`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False

    peft_type: ClassVar[str] = "LORA"
    unsupported: ClassVar[Mapping[str, Any]] = {
        "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "kasa_config": None, "layer_replication": None, "loftq_config": {}, "lora_ga_config": None,
        "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16,
        "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
        "use_qalora": False, "velora_config": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lora()

    def check_lora(self) -> None:
        """Check LoRA's own fields."""
        if not 0 <= self.lora_dropout < 1:
            raise AdapterError(f"lora_dropout: expected a probability in [0, 1), found {self.lora_dropout}")
        known = (True, False, "gaussian")
        if self.init_lora_weights not in known:
            raise AdapterError(f"init_lora_weights: expected one of {known}, found {self.init_lora_weights!r}")
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise AdapterError("lora_bias=True needs init_lora_weights True or False, as in PEFT")
        if self.lora_bias and self.use_dora:
            raise AdapterError("lora_bias=True is not supported with use_dora=True, as in PEFT")


def lora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    lora_B_bias: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph, rounded once to the base's dtype. The scale is applied where it is smallest."""
    y = base(x)
    h = kind.scale(kind.reduce(x if dropout is None else dropout(x), lora_A), scaling)
    update = kind.expand(h, lora_B)
    if lora_B_bias is not None:
        update = update + kind.per_output(lora_B_bias * scaling)
    out: Tensor = (y + update).type_as(y)
    return out


class Lora(Method[LoraConfig]):
    """Parameters ``lora_A``, ``lora_B`` and, with ``lora_bias``, ``lora_B_bias``."""

    name = "lora"
    peft_type = "LORA"
    needs: ClassVar = {"lora": (), "lora_bias": ("shift",)}
    config_class: type[LoraConfig] = LoraConfig

    def declared(self, config: LoraConfig) -> str:
        return "lora_bias" if config.lora_bias else self.name

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> SitePlan:
        rank = pattern_value(config.rank_pattern, site, config.r)
        alpha = pattern_value(config.alpha_pattern, site, config.lora_alpha)
        why = kind.check_rank(rank)
        if why:
            raise AdapterError(f"{site}: {why}; change r or rank_pattern, or leave the site out")
        if config.lora_bias and not kind.takes_bias:
            raise AdapterError(f"{site}: lora_bias=True is not supported on {kind.name}; leave the site out")
        return SitePlan(kind, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def shapes(self, config: LoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shapes = {"lora_A": plan.kind.a_shape(plan.rank), "lora_B": plan.kind.b_shape(plan.rank)}
        if config.lora_bias:
            shapes["lora_B_bias"] = (plan.kind.out_features,)
        return shapes

    def keys(self, kind: Kind) -> dict[str, str]:
        if kind.name == "embedding":
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}

    def initialise(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        a, b = parameters["lora_A"], parameters["lora_B"]
        mode = config.init_lora_weights
        if plan.kind.name == "embedding":
            nn.init.normal_(a) if mode is False else nn.init.zeros_(a)
            nn.init.normal_(b)
            return
        if mode == "gaussian":
            nn.init.normal_(a, std=1 / plan.rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if mode is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)
        if "lora_B_bias" in parameters:
            bound = 1 / math.sqrt(plan.rank) if mode is False else 0.0
            nn.init.uniform_(parameters["lora_B_bias"], -bound, bound)

    def dropout(self, config: LoraConfig, kind: Kind) -> float:
        return 0.0 if kind.name == "embedding" else config.lora_dropout

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        operands = ("lora_A", "lora_B", "scaling", "lora_B_bias", "dropout")
        held = {f"{name}.{o}": getattr(site, o) for o in operands if hasattr(site, o)}
        return Rewrite(f"lora:{name}", lora, held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b, bias = (parameters.get(name) for name in ("lora_A", "lora_B", "lora_B_bias"))
        assert a is not None
        assert b is not None
        shift = None if bias is None else bias.float() * plan.scaling
        return SlotValues(a, plan.kind.rows(b), _scales(plan.rank, plan.scaling), shift=shift)

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        kept = {"lora_A": lowered.a, "lora_B": plan.kind.unrows(lowered.b, plan.rank)}
        return kept | {name: value.detach().clone() for name, value in parameters.items() if name not in kept}


@functools.lru_cache(maxsize=1024)
def _scales(rank: int, scaling: float) -> Tensor:
    """One scale per rank; shared, never written."""
    return torch.full((rank,), scaling)
