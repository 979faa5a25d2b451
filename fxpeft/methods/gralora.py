"""GraLoRA (https://arxiv.org/abs/2505.20355): the weight falls into k x k blocks, each with a LoRA of its own.

    y_j = base(x)_j + alpha / (r + h) * (sum over i of B_j[i] (A_i[j] x_i) + the j-th part of a LoRA of rank h)

with ``A_i`` and ``B_j`` of r ranks, of which ``[j]`` is the j-th k-th. Together it is a LoRA of ``k r + h`` ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

NAMES = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")


@dataclass
class GraloraConfig(AdapterConfig):
    """Names and defaults of ``peft.GraloraConfig``.

    Args:
        r: rank of each of A's and B's blocks, a multiple of ``gralora_k``, which divides inputs and outputs.
        hybrid_r: rank of a LoRA of the whole weight beside them.
        alpha: the update is scaled by ``alpha / (r + hybrid_r)``. gralora_dropout: on its input while training.
        init_weights: B's start as zeros; ``False``: at random.
        bias: ``"gralora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's GraLoRA

    peft_type: ClassVar[str] = "GRALORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "gralora_k")
        self.check_probability("gralora_dropout")
        if self.hybrid_r < 0:
            raise AdapterError(f"hybrid_r: expected 0 or a rank, found {self.hybrid_r}")
        if self.r % self.gralora_k:
            raise AdapterError(f"r: expected a multiple of gralora_k {self.gralora_k}, found {self.r}")


def gralora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    gralora_A: Tensor,
    gralora_B: Tensor,
    scaling: Tensor,
    gralora_A_general: Tensor | None = None,
    gralora_B_general: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    x = x.type_as(gralora_A)
    update = mixed(x if dropout is None else dropout(x), gralora_A, gralora_B)
    if gralora_A_general is not None and gralora_B_general is not None:
        h = kind.reduce(x if dropout is None else dropout(x), gralora_A_general)
        update = update + kind.expand(h, gralora_B_general)
    out: Tensor = (y + kind.scale(update, scaling)).type_as(y)
    return out


@one_node
def mixed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``[..., in]`` to ``[..., out]``; ``a``: ``[k, in / k, r]``, ``b``: ``[k, r, out / k]``."""
    k = len(a)
    parts = x.unflatten(-1, (k, -1))  # type: ignore[no-untyped-call]
    h = torch.einsum("...ni,nir->...nr", parts, a).unflatten(-1, (k, -1))  # type: ignore[no-untyped-call]
    return torch.einsum("...jr,jro->...jo", h.transpose(-3, -2).flatten(-2), b).flatten(-2)


class Gralora(Method[GraloraConfig]):
    """Parameters ``gralora_A`` [k, in / k, r], ``gralora_B`` [k, r, out / k], and of a hybrid a LoRA's A and B."""

    name = "gralora"
    peft_type = "GRALORA"
    config_class = GraloraConfig

    def plan(self, config: GraloraConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("GraLoRA", site, kind)
        for what, size in (("inputs", kind.in_features), ("outputs", kind.out_features)):
            if size % config.gralora_k:
                raise AdapterError(f"{site}: gralora_k {config.gralora_k} doesn't divide its {size} {what}")
        return SitePlan(
            kind, config.gralora_k * config.r + config.hybrid_r, config.alpha / (config.r + config.hybrid_r)
        )

    def shapes(self, config: GraloraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        k, r, into, out = config.gralora_k, config.r, plan.kind.in_features, plan.kind.out_features
        shapes: tuple[tuple[int, ...], ...] = ((k, into // k, r), (k, r, out // k))
        if config.hybrid_r:
            shapes = (*shapes, (config.hybrid_r, into), (out, config.hybrid_r))
        return dict(zip(NAMES, shapes, strict=False))

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: f"{name}.weight" if name.endswith("general") else name for name in NAMES}

    def initialise(self, config: GraloraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        a, b = (parameters[name].transpose(1, 2) for name in NAMES[:2])
        pairs = [*zip(a, b, strict=True), *([tuple(parameters[n] for n in NAMES[2:])] if config.hybrid_r else [])]
        for first, second in pairs:
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            nn.init.zeros_(second) if config.init_weights else nn.init.kaiming_uniform_(second, a=math.sqrt(5))

    def dropout(self, config: GraloraConfig, kind: Kind) -> float:
        return config.gralora_dropout

    def rewrite(self, name: str, config: GraloraConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"gralora:{name}", gralora, site.operands(name, (*NAMES, "scaling", "dropout")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b = (parameters[name] for name in NAMES[:2])
        k = len(a)
        # a rank for each block of inputs, of outputs, and number between them
        first = a.new_zeros(k, k, a.shape[2] // k, k, a.shape[1])
        second = b.new_zeros(k, k, b.shape[1] // k, k, b.shape[2])
        for n in range(k):
            first[n, :, :, n] = a[n].t().unflatten(0, (k, -1))  # type: ignore[no-untyped-call]
            second[:, n, :, n] = b[n].unflatten(0, (k, -1))  # type: ignore[no-untyped-call]
        first, second = first.flatten(3).flatten(0, 2), second.flatten(3).flatten(0, 2)
        if NAMES[2] in parameters:
            first = torch.cat([first, parameters[NAMES[2]]])
            second = torch.cat([second, parameters[NAMES[3]].t()])
        return SlotValues(first, second, torch.full((plan.rank,), plan.scaling))

    def kept(self, config: GraloraConfig, plan: SitePlan) -> Kept:
        return Kept(own=plan.rank)
