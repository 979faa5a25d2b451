"""DoRA (https://arxiv.org/abs/2402.09353): a LoRA whose direction and magnitude are trained apart.

    y = g * (base(x) - bias + scale * B A dropout(x)) + bias,    g = m / |W + scale * B A|, row by row

with the norm held constant in the backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import Lora, LoraConfig, rest
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

MAGNITUDE = "lora_magnitude_vector"


def norms(kind: Kind, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor | float) -> Tensor:
    """The norm of every row of the adapted weight, ``[out]``."""
    adapted = weight + kind.delta(a, kind.rows(b) * scaling)
    found: Tensor = torch.linalg.vector_norm(adapted.flatten(1), dim=1)
    return found


def weight_rest(kind: Kind, weight: Tensor, a0: Tensor | None, b0: Tensor | None, scaling: Tensor | float) -> Tensor:
    """A weight without the first update, where there is one."""
    return weight if a0 is None or b0 is None else weight - kind.delta(a0, kind.rows(b0) * scaling)


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
    lora_A0: Tensor | None = None,
    lora_B0: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph. Dropout is PEFT's: the part of the base that the gain changes sees it too."""
    whole = base(x)
    y = rest(kind, whole, x, lora_A0, lora_B0, scaling)
    own = weight_rest(kind, weight.type_as(lora_A).detach(), lora_A0, lora_B0, scaling)
    norm = norms(kind, own, lora_A.detach(), lora_B.detach(), scaling)
    gain = lora_magnitude_vector.flatten() / norm
    if dropout is None:
        # the gain of the update is one of B, which has no tokens
        update = kind.update(x, lora_A, kind.gained(lora_B, gain), scaling)
        out: Tensor = kind.per_output(gain) * y + update
        if bias is not None:
            out = out + kind.per_output((1 - gain) * bias)
        return out.type_as(whole)
    # as a difference, which is zero in evaluation: y may be another adapter's, or padded otherwise
    exact = x.type_as(lora_A)
    dropped = dropout(exact)
    change = dropped - exact
    plain = y if bias is None else y - kind.per_output(bias)
    plain = plain + rest(kind, kind.apply(change, weight.type_as(change)), change, lora_A0, lora_B0, scaling)
    update = kind.update(dropped, lora_A, kind.gained(lora_B, gain), scaling)
    out = y + kind.per_output(gain - 1) * plain + update
    return out.type_as(whole)


class Dora(Lora):
    """LoRA's parameters and ``lora_magnitude_vector``."""

    name = "dora"
    variant: ClassVar = {"use_dora": True}
    needs: ClassVar = {"dora": ("g_out", "shift")}
    follows_base = True

    def takes(self, config: AdapterConfig) -> bool:
        return isinstance(config, LoraConfig) and config.use_dora

    def declared(self, config: LoraConfig) -> str:
        return self.name

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> SitePlan:
        if kind.groups > 1:
            raise AdapterError(
                f"{site}: DoRA of a grouped convolution: its update is no change of the weight, so it has no norm; "
                "leave the site out or set use_dora=False"
            )
        return super().plan(config, site, kind)

    def shapes(self, config: LoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        out, kernel = plan.kind.out_features, plan.kind.kernel
        magnitude = (1, out, *(1 for _ in kernel)) if kernel else (out,)
        return {**super().shapes(config, plan), MAGNITUDE: magnitude}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {**super().keys(kind), MAGNITUDE: MAGNITUDE}

    def kept(self, config: LoraConfig, plan: SitePlan) -> Kept:
        kept, out = super().kept(config, plan), plan.kind.out_features
        if self.dropout(config, plan.kind):  # what it changes of the base's output is in the adapter's dtype
            return kept._replace(own=kept.own + out)
        return kept._replace(outputs=out)

    def initialise(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        super().initialise(config, plan, parameters, base)
        magnitude = parameters[MAGNITUDE]
        magnitude.copy_(self._norms(plan, parameters, base.weight()).view_as(magnitude))

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        operands = ("lora_A", "lora_B", "scaling", MAGNITUDE, "lora_A0", "lora_B0", "dropout")
        held = site.operands(name, operands)
        # an embedding's graph may be a leaf call of the module, and it has no bias
        reads = ("weight", "bias") if site.plan.kind.takes_bias else ("weight",)
        return Rewrite(f"dora:{name}", dora, held, reads=reads)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        ranks = super().lower(plan, parameters, base)
        magnitude, bias = parameters[MAGNITUDE], base.bias()
        magnitude = magnitude.flatten().to(torch.promote_types(magnitude.dtype, torch.float32))
        gain = magnitude / self._norms(plan, parameters, base.weight())
        return ranks._replace(g_out=gain, shift=None if bias is None else bias.to(gain) * (1 - gain))

    def _norms(self, plan: SitePlan, parameters: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        weight = weight.to(parameters[MAGNITUDE].device)
        given = (parameters.get(name) for name in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
        a, b, a0, b0 = (None if p is None else p.to(weight) for p in given)
        assert a is not None
        assert b is not None
        return norms(plan.kind, weight_rest(plan.kind, weight, a0, b0, plan.scaling), a, b, plan.scaling)
