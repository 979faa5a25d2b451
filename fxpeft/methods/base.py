"""What a method is: shapes, a first value, training mathematics, slot values, checkpoint keys."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fxpeft.config import AdapterConfig
from fxpeft.passes.feed import Feed
from fxpeft.passes.inject import Rewrite
from fxpeft.passes.kinds import Kind

C = TypeVar("C", bound=AdapterConfig)


@dataclass(frozen=True)
class SitePlan:
    """What an adapter puts at one site.

    Args:
        kind: the site's kind. rank: the adapter's rank there. scaling: the factor of its update.
    """

    kind: Kind
    rank: int
    scaling: float


class SiteAdapter(nn.Module):
    """One adapter's parameters at one site, with the scale as a tensor so that changing it recompiles nothing.

    ``scaling`` stays float32 whatever dtype the model is cast to: alpha / rank rounded to bfloat16
    would be off by up to 0.4%.
    """

    scaling: Tensor

    def __init__(
        self, plan: SitePlan, parameters: Mapping[str, Tensor], *, dropout: float = 0.0, strength: float = 1.0
    ) -> None:
        super().__init__()
        self.plan = plan
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        device = next((p.device for p in parameters.values()), None)
        self.register_buffer("scaling", torch.tensor(plan.scaling * strength, device=device), persistent=False)
        self.strength = strength
        if dropout:
            self.dropout = nn.Dropout(dropout)

    def set_strength(self, strength: float) -> None:
        """Multiply the adapter's own scale by ``strength``."""
        self.strength = strength
        self.scaling.fill_(self.plan.scaling * strength)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteAdapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        exact = torch.tensor(self.plan.scaling * self.strength, dtype=torch.float32)
        self.scaling = exact.to(self.scaling.device) if not self.scaling.is_meta else exact.to("meta")
        return self


class SlotValues(NamedTuple):
    """A site's adapter in the form that every slot takes, ranks first.

    ``a``: [rank, in, ...], ``b``: [rank, out], ``d``: [rank] float32; ``shift``: [out] or ``None``.
    """

    a: Tensor
    b: Tensor
    d: Tensor
    shift: Tensor | None = None


class Method(abc.ABC, Generic[C]):
    """One method. Everything that differs between methods is in its file."""

    peft_type: ClassVar[str]
    config_class: type[C]
    #: the site is the whole model's forward, found by :meth:`PromptMethod.find`; one at a time, without a scale
    whole: ClassVar[bool] = False
    prefix: ClassVar[str] = "base_model.model."  # what PEFT puts before a module's name in a checkpoint

    @abc.abstractmethod
    def plan(self, config: C, site: str, kind: Kind) -> SitePlan:
        """Rank and scaling at a site; ``AdapterError`` where the method can't serve its kind."""

    @abc.abstractmethod
    def shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape at one site."""

    @abc.abstractmethod
    def keys(self, kind: Kind) -> dict[str, str]:
        """Parameter name -> PEFT's checkpoint suffix below the site's name."""

    @abc.abstractmethod
    def initialise(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor]) -> None:
        """Fill fresh parameters in place."""

    @abc.abstractmethod
    def rewrite(self, name: str, config: C, site: SiteAdapter) -> Rewrite | Feed:
        """The training subgraph of adapter ``name``; of a whole model, what prepares its inputs."""

    @abc.abstractmethod
    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor]) -> SlotValues:
        """The slot values that compute what the training subgraph computes, dropout aside.

        Views of ``parameters`` wherever that is possible.
        """

    def part(
        self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        """The module that holds the parameters at one site while the adapter is attached."""
        return SiteAdapter(plan, parameters, dropout=self.dropout(config, plan.kind), strength=strength)

    def stored(self, config: C, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds of a site, by key."""
        return {f"{self.prefix}{self.key(site, plan, name)}": value for name, value in parameters.items()}

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        """A parameter's checkpoint key, without :attr:`prefix`."""
        return f"{site}.{self.keys(plan.kind)[name]}"

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        """The parameters in memory that belongs to the adapter: views of ``lowered`` where that is exact."""
        return {name: value.detach().clone() for name, value in parameters.items()}

    def dropout(self, config: C, kind: Kind) -> float:
        """Probability of dropping an input of the training subgraph."""
        return 0.0

    def bias(self, config: C) -> str:
        """``none``, ``all`` or ``own`` (the sites'): whose bias the adapter trains."""
        value: Any = getattr(config, "bias", "none")
        return "own" if str(value).endswith("_only") else str(value)
