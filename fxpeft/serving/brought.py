"""What an adapter brings beside its ranks: gains and shifts, modules and parameters, each in its place or neutral."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxpeft.adapters.state import Adapter
from fxpeft.methods.values import Values
from fxpeft.model.walk import base_state, base_value, base_values
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import attribute, join
from fxpeft.passes.slots.slot import FEATURES, Slot
from fxpeft.passes.torch_private import version_of

Holds: TypeAlias = dict[str, tuple[Values | None, Any]]


def show_features(slots: Mapping[str, Slot], featured: set[tuple[str, str]], adapters: list[Adapter]) -> None:
    """Gains and shifts: the one adapter's that has them, the sum of shifts, or the neutral value."""
    first = adapters[0].lowered if adapters else {}
    for site, slot in slots.items():
        lowered = [a.lowered[site] for a in adapters if site in a.lowered]
        for name in slot.features:
            given = [value for v in lowered if (value := getattr(v, name)) is not None]
            if given:
                if len(given) > 1 or site not in first or given[0] is not getattr(first[site], name):
                    getattr(slot, name).copy_(given[0] if len(given) == 1 else torch.stack(given).sum(0))
                featured.add((site, name))
            elif (site, name) in featured:
                getattr(slot, name).fill_(FEATURES[name])
                featured.discard((site, name))


def show_copies(
    model: nn.Module,
    copies: Mapping[str, nn.Module],
    tensors: Collection[str],
    holds: Holds,
    adapters: list[Adapter],
) -> None:
    """Modules and parameters that an adapter brings, or the base's own; copied where that changes."""
    for path, copy in copies.items():
        owner = next((a.values for a in adapters if path in a.values.saved), None)
        written = _written(base_state(submodule(model, path)).values()) if owner is None else ()
        if not _holds(holds, path, owner, written):
            own = base_values(submodule(model, path)) if owner is None else owner.saved[path]
            for key, tensor in own.items():
                attribute(copy, key).copy_(tensor.detach())
            holds[path] = owner, written
    for path in tensors:
        owner = next((a.values for a in adapters if path in a.values.tensors), None)
        written = _written([attribute(model, path)]) if owner is None else ()
        if not _holds(holds, path, owner, written):
            site, _, leaf = path.rpartition(".")
            value: Tensor = base_value(model, path) if owner is None else owner.tensors[path]
            attribute(model, join(site, "slot", leaf)).copy_(value.detach())
            holds[path] = owner, written


def _holds(holds: Holds, path: str, owner: Values | None, written: tuple[tuple[int, int], ...]) -> bool:
    held = holds.get(path)
    return held is not None and held[0] is owner and held[1] == written


def _written(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which tensors, and how often they were written: other weights of the base make its copies stale."""
    return tuple((id(t), 0 if t.is_inference() else version_of(t)) for t in tensors)
