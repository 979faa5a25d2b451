"""What an adapter has at a site: what is planned there, and the modules that hold its parameters meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.passes.base import join
from fxpeft.passes.container import Read
from fxpeft.passes.slots.reach import ReachAt
from fxpeft.passes.targets.kinds import Kind


@dataclass(frozen=True)
class SitePlan:
    """What an adapter puts at one site.

    Args:
        kind: the site's kind. rank: the adapter's rank there. scaling: the factor of its update.
        wrapped: how many more wrappers PEFT puts around the site than around its module's last one.
    """

    kind: Kind
    rank: int
    scaling: float
    wrapped: int = field(default=0, kw_only=True)

    @property
    def block(self) -> int:
        """How many inputs are rotated together, of a method that does so."""
        return 0

    @property
    def alone(self) -> str:
        """What of its kind only one can be active at the site, of methods that say the same word."""
        return ""

    @property
    def factor(self) -> int:
        """By which inputs and outputs are taken apart for a Kronecker product, of a method that has one; else 0."""
        return 0

    def scaled(self, strength: float) -> SitePlan:
        """The same with its scale multiplied."""
        return self if strength == 1 else replace(self, scaling=self.scaling * strength)


def check_linear(method: str, site: str, kind: Kind) -> None:
    """Refuse a site of another kind.

    Raises:
        AdapterError: it is no linear layer.
    """
    if not kind.is_linear:
        raise AdapterError(f"{site}: {method} adapts linear layers, as in PEFT, found {kind}; leave the site out")


class SharedPart(Read):
    """What all sites of one adapter share while it is attached: a parameter, or a buffer, for each tensor.

    Args:
        trained: names of those that are trained; the others are buffers.
    """

    def __init__(self, tensors: Mapping[str, Tensor], trained: Collection[str] = ()) -> None:
        super().__init__()
        _register(self, tensors, tensors.keys() - set(trained))

    def extra_repr(self) -> str:
        """Names and shapes."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in held.items())


class SiteAdapter(Read):
    """One adapter's parameters at one site, with the scale as a tensor so that changing it recompiles nothing.

    Args:
        frozen: those of ``parameters`` that are never trained; they become buffers.

    ``shared`` is what the adapter's sites share, where its method has such. It is a child of the first site's part, and
    no child of the others, so that it is trained, moved and listed once. ``parted``: along with the site's module.
    ``reach``: which tokens it acts on, where it has an invocation; in a program the input that says so.

    ``scaling`` stays float32 whatever dtype the model is cast to: alpha / rank rounded to bfloat16
    would be off by up to 0.4%. ``running`` says whether the site's forward computes with it, for whoever prints it.
    """

    scaling: Tensor
    shared: SharedPart
    reach: ReachAt | Tensor
    running, parted, factor = False, False, 1.0

    def __init__(
        self,
        plan: SitePlan,
        parameters: Mapping[str, Tensor],
        *,
        dropout: float = 0.0,
        strength: float = 1.0,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.plan = plan
        _register(self, parameters, frozen)
        device = next((p.device for p in parameters.values()), None)
        scaling = torch.tensor(plan.scaling * strength, device=device, dtype=torch.float32)
        self.register_buffer("scaling", scaling, persistent=False)
        self.strength, self.factor = strength, 1.0
        if dropout:
            self.dropout = nn.Dropout(dropout)

    def share(self, shared: SharedPart, *, hold: bool = False) -> None:
        """Let the site read what all sites share, or hold it for all of them."""
        if hold:
            self.add_module("shared", shared)
        else:
            vars(self)["shared"] = shared

    def operands(self, path: str, names: Iterable[str]) -> dict[str, Any]:
        """Where a rewrite finds those of its operands that the site has -> each of them."""
        return {join(path, name): getattr(self, name) for name in names if hasattr(self, name)}

    def set_strength(self, strength: float, factor: float = 1.0) -> None:
        """Multiply the adapter's own scale by ``strength``, and by the factor that a call asks for."""
        self.strength, self.factor = strength, factor
        self.scaling.fill_(self.plan.scaling * strength * factor)

    def extra_repr(self) -> str:
        """Shapes, scale, and whether it is off."""
        shown = [f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False)]
        shown += [f"scale={self.plan.scaling * self.strength:.4g}"] if self.plan.rank else []
        return ", ".join(shown if self.running else [*shown, "off"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteAdapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        exact = torch.tensor(self.plan.scaling * self.strength * self.factor, dtype=torch.float32)
        self.scaling = exact.to(self.scaling.device) if not self.scaling.is_meta else exact.to("meta")
        return self


def _register(module: nn.Module, tensors: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    for name, value in tensors.items():
        if name in frozen:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value))
