"""C3A (https://arxiv.org/abs/2407.19342): the update is made of circulant blocks, each of one trained row.

    y = base(x) + C x / in,    C[m, n][i, j] = kernel[m, n, (j - i) mod size]

of full rank: a slot takes as many ranks as the weight's smaller side.
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
from fxpeft.methods.lycoris import applied, full_rank
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.one_node import one_node

KERNEL = "c3a_kernel"


@dataclass
class C3AConfig(AdapterConfig):
    """Names and defaults of ``peft.C3AConfig``.

    Args:
        block_size: size of the blocks, which divides inputs and outputs. block_size_pattern: name suffix or regular
            expression -> the site's own value.
        init_weights: ``True``: zeros; ``"xavier_uniform"``, which ``False`` is too, ``"kaiming_uniform"`` or
            ``"gaussian"``.
        bias: ``"c3a_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "c3a_only"] = "none"
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's C3A

    peft_type: ClassVar[str] = "C3A"
    patterns: ClassVar[tuple[str, ...]] = ("block_size_pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("block_size", "block_size_pattern")


def c3a(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, c3a_kernel: Tensor) -> Tensor:
    """The training subgraph."""
    return applied(kind, base, x, circulant(c3a_kernel), None)


@one_node
def circulant(kernel: Tensor) -> Tensor:
    """The update ``[out, in]`` of ``[out / size, in / size, size]``."""
    size = kernel.shape[2]
    places = torch.arange(size, device=kernel.device)
    blocks = kernel[:, :, (places - places.unsqueeze(1)) % size]  # [m, n, i, j]
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / (kernel.shape[1] * size)


class C3A(Method[C3AConfig]):
    """The parameter ``c3a_kernel`` [out / size, in / size, size]."""

    name = "c3a"
    peft_type = "C3A"
    config_class = C3AConfig

    def plan(self, config: C3AConfig, site: str, kind: Kind) -> SitePlan:
        check_linear("C3A", site, kind)
        size = pattern_value(config.block_size_pattern, site, config.block_size, "block_size_pattern")
        for what, count in (("inputs", kind.in_features), ("outputs", kind.out_features)):
            if count % size:
                raise AdapterError(f"{site}: block_size {size} doesn't divide its {count} {what}")
        return SitePlan(kind, size, 1.0)

    def shapes(self, config: C3AConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {KERNEL: (plan.kind.out_features // plan.rank, plan.kind.in_features // plan.rank, plan.rank)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {KERNEL: KERNEL}

    def initialise(self, config: C3AConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        kernel, how, into = parameters[KERNEL], config.init_weights, plan.kind.in_features
        if how is True or how is None:
            nn.init.zeros_(kernel)
        elif how == "gaussian":
            nn.init.normal_(kernel)
        else:
            bound = math.sqrt(1 / into if how == "kaiming_uniform" else 6 / (into + plan.kind.out_features))
            nn.init.uniform_(kernel, -bound, bound)

    def rewrite(self, name: str, config: C3AConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"c3a:{name}", c3a, site.operands(name, (KERNEL,)))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        return full_rank(circulant(parameters[KERNEL]), 1.0)

    def kept(self, config: C3AConfig, plan: SitePlan) -> Kept:
        return Kept()

    def scales(self, config: C3AConfig) -> bool:
        return False
