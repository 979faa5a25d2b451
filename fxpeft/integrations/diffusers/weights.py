"""Weights of adapters as diffusers takes them: one, one a name, by component, by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from torch import nn

from fxpeft.adapters.state import Adapter, Strength
from fxpeft.errors import AdapterError, listing
from fxpeft.model.wrappers import unwrap

#: one for all of a model, or block -> weight, as ``{"down": 0.5, "up": {"block_1": [0.2, 0.3, 0.4]}}`` of a UNet
Weight: TypeAlias = float | Mapping[str, Any]


def of_names(weights: Any, names: Sequence[str]) -> list[Any]:
    """A weight for each name.

    Raises:
        AdapterError: as many are expected as there are names.
    """
    each = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
    if len(each) != len(names):
        raise AdapterError(f"weights: expected one for each of {len(names)} adapters, found {len(each)}")
    return [1.0 if weight is None else weight for weight in each]


def of_components(weights: Any, names: Sequence[str], components: Sequence[str]) -> dict[str, list[Weight]]:
    """Component -> a weight for each name; those that a mapping doesn't name have 1.

    Raises:
        AdapterError: a mapping names something else, or there are more or fewer than names.
    """
    each = of_names(weights, names)
    unknown = {key for weight in each if isinstance(weight, Mapping) for key in weight if key not in components}
    if unknown:
        raise AdapterError(
            f"weights: expected components, {', '.join(components)}; found {', '.join(sorted(map(str, unknown)))}"
        )
    found: dict[str, list[Weight]] = {}
    for component in components:
        own = [weight.get(component) if isinstance(weight, Mapping) else weight for weight in each]
        found[component] = [1.0 if weight is None else weight for weight in own]
    return found


def strength(model: nn.Module, adapter: Adapter, weight: Weight) -> Strength:
    """What :func:`fxpeft.set_scale` takes for a weight: of blocks, site -> weight.

    Raises:
        AdapterError: a block that the model or the adapter hasn't got.
    """
    if not isinstance(weight, Mapping):
        return float(weight)
    bare: Any = unwrap(model)
    try:
        blocks = _SET_ADAPTER_SCALE_FN_MAPPING[type(bare).__name__](bare, [dict(weight)])[0]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"weights of {type(bare).__name__}: {error}") from error
    found: dict[str, float] = {}
    used = set()
    for site in adapter.values.sites:
        own = next((block for block in blocks if f".{block}." in f".{site}."), None)
        used.add(own)
        found[site] = 1.0 if own is None else float(blocks[own])
    asked = blocks if blocks == dict(weight) else {}  # those that diffusers fills in may have no site
    if unused := [block for block in asked if block not in used]:
        raise AdapterError(
            f"weights: no site of adapter {adapter.name!r} is in these:\n{listing(unused)}\nIts sites:\n"
            f"{listing(adapter.values.sites)}"
        )
    return found
