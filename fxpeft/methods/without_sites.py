"""Methods that adapt no site: an adapter brings modules, or rows of a weight, and nothing is added to an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from fxpeft.errors import AdapterError, short
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.patterns import is_pattern


@dataclass
class NamesConfig(AdapterConfig):
    """A config whose ``target_modules`` are names, or one regular expression: what is there need be no target."""

    layers_to_transform: None = field(default=None, init=False)  # no fields of PEFT's
    layers_pattern: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if is_pattern(value) or (isinstance(value, list) and any(map(is_pattern, value))):
                raise AdapterError(
                    f"{name}: expected names, or one regular expression, found a pattern, which selects targets"
                )


C = TypeVar("C", bound=NamesConfig)


class WithoutSites(Method[C]):
    """What a method without sites says to all that is asked of sites."""

    targeted = False

    def find(self, model: nn.Module, config: C) -> tuple[C, dict[str, SitePlan]]:
        return config, {}

    def selected(self, config: C, names: Mapping[str, object]) -> list[str]:
        """The modules that ``target_modules`` names.

        Raises:
            AdapterError: there is none.
        """
        found = config.selector().select(names)
        if not found:
            raise AdapterError(f"no module of the model is named by target_modules={short(config.target_modules)}")
        return found

    def plan(self, config: C, site: str, kind: Kind) -> SitePlan:
        raise NotImplementedError(f"{site}: {self.name} has no sites")

    def shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {}

    def initialise(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        return

    def rewrite(self, name: str, config: C, site: SiteAdapter) -> Rewrite:
        raise NotImplementedError(f"{self.name} has no sites")

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        raise NotImplementedError(f"{self.name} has no sites")

    def scales(self, config: C) -> bool:
        return False
