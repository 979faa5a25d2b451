"""A base model's modules by name: walked once for all that is asked of them while one adapter comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.model.placement import ZERO
from fxpeft.model.reads import idle
from fxpeft.model.walk import base_modules
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.live import Container, kind_of
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.torch_private import FSDP


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
        named = dict(base_modules(self.model))
        theirs = next((name for name, module in named.items() if of_peft(module)), None)
        if theirs is not None:
            raise AdapterError(
                f"{theirs or 'the model'} is PEFT's, a {type(named[theirs]).__name__}, and its factors would be taken "
                "for targets: model = fxpeft.adopt(model) takes PEFT's adapters over; or unload them"
            )
        return named

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
        """The kind of target that a module is; ``PassError`` where it is none.

        Raises:
            AdapterError: what the kind would be read off is parted.
        """
        if name not in self._kinds:
            _check_whole(name, self._named[name])
            self._kinds[name] = kind_of(self._named[name])
        return self._kinds[name]


def of_peft(module: nn.Module) -> bool:
    """Whether a module's class is PEFT's, which need not be installed."""
    return type(module).__module__.partition(".")[0] == "peft"


def _check_whole(name: str, module: nn.Module) -> None:
    """Refuse a module whose weight FSDP1 or ZeRO-3 has made a piece of, flat or empty; FSDP2's has its own shape."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim < 2 and (FSDP in vars(module) or hasattr(weight, ZERO)):
        raise AdapterError(
            f"{name}: FSDP1 or ZeRO-3 keeps a part of its weight here, of shape {list(weight.shape)}, so no adapter "
            "can be fitted to it: add, load and prepare before the model is wrapped"
        )
