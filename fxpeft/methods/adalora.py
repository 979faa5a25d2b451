"""AdaLoRA (https://arxiv.org/abs/2303.10512): a LoRA in the form of a singular value decomposition.

    y = base(x) + alpha / (init_r + 1e-5) * B diag(E) A dropout(x)

The ranks with the least importance are switched off while it trains (:mod:`fxpeft.adapters.allocator`), and
A and B are kept near orthogonal by a term of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.walk import full_tensor
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's config: names and defaults of ``peft.AdaLoraConfig``. ``r`` is not used, as there.

    Args:
        init_r: the rank at the start. target_r: the average rank at the end.
        total_step: how many steps the training has. tinit: steps before ranks are taken away.
        tfinal: steps after. deltaT: steps from one allocation to the next.
        beta1, beta2: smoothing of sensitivity and uncertainty.
        orth_reg_weight: weight of the orthogonality term in the loss.
        rank_pattern: ``site.lora_E`` -> which of its ranks are on; the allocator writes it.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    peft_type: ClassVar[str] = "ADALORA"
    patterns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        AdapterConfig.__post_init__(self)  # rank_pattern is no pattern here
        self.check_lora()
        names = ("use_dora", "lora_bias", "use_rslora", "loftq_config", "eva_config", "target_parameters")
        unused = {name: getattr(self, name) for name in names}
        unused["init_lora_weights"] = self.init_lora_weights not in (True, False, "gaussian")
        wrong = [name for name, value in unused.items() if value] + (["alpha_pattern"] if self.alpha_pattern else [])
        if wrong:
            raise AdapterError(f"{', '.join(wrong)}: has no effect with AdaLoRA; leave it at its default")
        if self.total_step is None or self.total_step <= 0:
            raise AdapterError(f"total_step: expected the number of training steps, found {self.total_step}")
        if self.tinit >= self.total_step - self.tfinal:
            raise AdapterError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of {self.total_step} steps to allocate ranks "
                "in; decrease them or increase total_step"
            )
        if self.orth_reg_weight < 0:
            raise AdapterError(f"orth_reg_weight: expected at least 0, found {self.orth_reg_weight}")
        self.check_positive("init_r", "target_r", "deltaT")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise AdapterError(f"{name}: expected a number between 0 and 1, found {getattr(self, name)}")


def adalora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_E: Tensor,
    scaling: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph. A convolution's A is flat, ``[rank, in * kernel]``, and its B ``[out, rank]``."""
    y = base(x)
    a = lora_A.view(-1, *kind.a_shape(1)[1:])
    dropped = x if dropout is None else dropout(x.type_as(a))
    h = kind.scale(kind.reduce(dropped, a), lora_E.flatten() * scaling)
    out: Tensor = (y + kind.expand_rows(h, lora_B.t())).type_as(y)
    return out


class AdaLora(Method[AdaLoraConfig]):
    """Parameters ``lora_A``, ``lora_B`` and the singular values ``lora_E``."""

    name = "adalora"
    peft_type = "ADALORA"
    config_class = AdaLoraConfig

    def plan(self, config: AdaLoraConfig, site: str, kind: Kind) -> SitePlan:
        plain_image = len(kind.kernel) == 2 and kind.groups == 1 and kind.like_target
        if not kind.is_linear and not plain_image:
            raise AdapterError(
                f"{site}: AdaLoRA adapts linear layers and plain conv2d, as in PEFT, found {kind}; leave the site out"
            )
        mask = (config.rank_pattern or {}).get(f"{site}.lora_E")
        if mask is not None and len(mask) > config.init_r:
            raise AdapterError(f"{site}: rank_pattern has {len(mask)} ranks, init_r is {config.init_r}")
        # ranks that were taken away leave the scale as it was: PEFT's ranknum stays at init_r
        scale = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        return SitePlan(kind, config.init_r if mask is None else sum(mask), scale)

    def shapes(self, config: AdaLoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        size = torch.Size(plan.kind.a_shape(1)).numel()
        return {
            "lora_A": (plan.rank, size), "lora_B": (plan.kind.out_features, plan.rank), "lora_E": (plan.rank, 1),
        }  # fmt: skip

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in ("lora_A", "lora_B", "lora_E")}

    def initialise(self, config: AdaLoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        for name in ("lora_A", "lora_B"):
            nn.init.normal_(parameters[name], std=0.02 if config.init_lora_weights else 1.0)
        nn.init.zeros_(parameters["lora_E"]) if config.init_lora_weights else nn.init.normal_(parameters["lora_E"])

    def kept(self, config: AdaLoraConfig, plan: SitePlan) -> Kept:
        return Kept(own=2 * plan.rank)  # after A for the singular values, times these for B

    def dropout(self, config: AdaLoraConfig, kind: Kind) -> float:
        return config.lora_dropout

    def rewrite(self, name: str, config: AdaLoraConfig, site: SiteAdapter) -> Rewrite:
        operands = ("lora_A", "lora_B", "lora_E", "scaling", "dropout")
        held = site.operands(name, operands)
        return Rewrite(f"adalora:{name}", adalora, held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a = parameters["lora_A"].view(-1, *plan.kind.a_shape(1)[1:])
        return SlotValues(a, parameters["lora_B"].t(), parameters["lora_E"].flatten().float() * plan.scaling)

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        return {
            "lora_A": lowered.a.flatten(1), "lora_B": lowered.b.t(), "lora_E": parameters["lora_E"].detach().clone(),
        }  # fmt: skip

    def stored(
        self, config: AdaLoraConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        mask = (config.rank_pattern or {}).get(f"{site}.lora_E")
        if mask is None or len(mask) != len(parameters["lora_E"]) or all(mask):
            return dict(parameters)
        on = torch.tensor(mask, device=parameters["lora_E"].device)
        return {n: value[:, on] if n == "lora_B" else value[on] for n, value in parameters.items()}

    def penalty(self, config: AdaLoraConfig, sites: Iterable[SiteAdapter]) -> Tensor | None:
        """How far A and B are from orthogonal, PEFT's ``AdaLoraModel.forward``."""
        terms = []
        for site in sites:
            for p in (full_tensor(site.get_parameter("lora_A")), full_tensor(site.get_parameter("lora_B")).t()):
                covariance = p @ p.t()
                identity = torch.eye(len(covariance), device=p.device, dtype=p.dtype)
                terms.append(torch.linalg.matrix_norm(covariance - identity))
        return config.orth_reg_weight * torch.stack(terms).mean() if terms else None
