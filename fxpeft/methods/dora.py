"""DoRA (https://arxiv.org/abs/2402.09353): a LoRA whose direction and magnitude are trained apart.

    y = g * (base(x) - bias + scale * B A dropout(x)) + bias,    g = m / |W + scale * B A|, row by row

with the norm held constant in the backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fxpeft.config import AdapterConfig
from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.lora import Lora, LoraConfig
from fxpeft.passes.inject import Rewrite
from fxpeft.passes.kinds import Conv, Kind

MAGNITUDE = "lora_magnitude_vector"


def norms(kind: Kind, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor | float) -> Tensor:
    """The norm of every row of the adapted weight, ``[out]``."""
    adapted = weight + kind.delta(a, kind.rows(b)) * scaling
    found: Tensor = torch.linalg.vector_norm(adapted.flatten(1), dim=1)
    return found


def dora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    lora_magnitude_vector: Tensor,
    bias: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph. Dropout is PEFT's: the part of the base that the gain changes sees it too."""
    y = base(x)
    norm = norms(kind, weight.type_as(lora_A).detach(), lora_A.detach(), lora_B.detach(), scaling)
    gain = kind.per_output(lora_magnitude_vector.flatten() / norm)
    if dropout is not None:
        x = dropout(x)
        plain = kind.apply(x, weight)
    else:
        plain = y if bias is None else y - kind.per_output(bias)
    update = kind.expand(kind.scale(kind.reduce(x, lora_A), scaling), lora_B)
    out: Tensor = (y + (gain - 1) * plain + gain * update).type_as(y)
    return out


class Dora(Lora):
    """LoRA's parameters and ``lora_magnitude_vector``."""

    name = "dora"
    needs: ClassVar = {"dora": ("g_out", "shift")}

    def takes(self, config: AdapterConfig) -> bool:
        return isinstance(config, LoraConfig) and config.use_dora

    def declared(self, config: LoraConfig) -> str:
        return self.name

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> SitePlan:
        if isinstance(kind, Conv) and kind.groups > 1:
            raise AdapterError(
                f"{site}: DoRA of a grouped convolution: its update is no change of the weight, so it has no norm; "
                "leave the site out or set use_dora=False"
            )
        return super().plan(config, site, kind)

    def shapes(self, config: LoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        out, kernel = plan.kind.out_features, getattr(plan.kind, "kernel", ())
        magnitude = (1, out, *(1 for _ in kernel)) if kernel else (out,)
        return {**super().shapes(config, plan), MAGNITUDE: magnitude}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {**super().keys(kind), MAGNITUDE: MAGNITUDE}

    def initialise(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        super().initialise(config, plan, parameters, base)
        a, b, magnitude = (parameters[name] for name in ("lora_A", "lora_B", MAGNITUDE))
        magnitude.copy_(norms(plan.kind, base.weight(), a.float(), b.float(), plan.scaling).view_as(magnitude))

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        operands = ("lora_A", "lora_B", "scaling", MAGNITUDE, "dropout")
        held = {f"{name}.{o}": getattr(site, o) for o in operands if hasattr(site, o)}
        # an embedding's graph may be a leaf call of the module, and it has no bias
        reads = ("weight", "bias") if site.plan.kind.takes_bias else ("weight",)
        return Rewrite(f"dora:{name}", dora, held, reads=reads)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        ranks = super().lower(plan, parameters, base)
        a, b, magnitude = (parameters[name].float() for name in ("lora_A", "lora_B", MAGNITUDE))
        weight, bias = base.weight().to(a.device), base.bias()
        gain = magnitude.flatten() / norms(plan.kind, weight, a, b, plan.scaling)
        return ranks._replace(g_out=gain, shift=None if bias is None else bias.to(gain) * (1 - gain))
