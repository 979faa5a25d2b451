"""A base model's modules by name: walked once for all that is asked of them while one adapter comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import nn

from fxpeft.model.reads import idle
from fxpeft.model.walk import base_modules
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.live import Container, kind_of
from fxpeft.passes.targets.kinds import Kind


class Modules(Mapping[str, nn.Module]):
    """The modules of a base model as :func:`~fxpeft.model.walk.base_modules` walks them, where first asked for.

    Made for one change of a model: it doesn't see modules that come or go later. What it was asked about a module it
    knows from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self._idle: dict[str, str | None] = {}
        self._kinds: dict[str, Kind] = {}

    @classmethod
    def of(cls, model: nn.Module | Modules) -> Modules:
        """A model's modules; these themselves where they are given."""
        return model if isinstance(model, Modules) else cls(model)

    @cached_property
    def _named(self) -> dict[str, nn.Module]:
        return dict(base_modules(self.model))

    def __getitem__(self, name: str) -> nn.Module:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def is_leaf(self, name: str) -> bool:
        """Whether a module has none of the base's below it."""
        return all(isinstance(child, Container) for child in self._named[name].children())

    def idle(self, name: str) -> str | None:
        """Why an adapter at a module would do nothing, or ``None``; see :func:`fxpeft.model.reads.idle`."""
        if name not in self._idle:
            self._idle[name] = idle(name, self._named)
        return self._idle[name]

    def kind(self, name: str) -> Kind:
        """The kind of target that a module is; ``PassError`` where it is none."""
        if name not in self._kinds:
            self._kinds[name] = kind_of(self._named[name])
        return self._kinds[name]
