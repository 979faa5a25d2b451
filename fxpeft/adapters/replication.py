"""Repeating the layers of a model that has no adapters yet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxpeft.adapters.state import find_state
from fxpeft.errors import AdapterError
from fxpeft.model.replication import replicate
from fxpeft.model.wrappers import unwrap


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
    """Repeat layers of a transformer with their weights shared, as ``layer_replication`` of an adapter asks for.

    It stays: to have the model as it was, load it again. Each of the layers can have factors of its own.

    Args:
        ranges: of layers, ``[start, end)`` each: ``[[0, 4], [2, 5]]`` makes layers 0, 1, 2, 3, 2, 3, 4.

    Raises:
        AdapterError: the model has adapters, or no such layers; nothing was changed.
    """
    model = unwrap(model)
    if find_state(model) is not None:
        raise AdapterError(
            "replicate_layers: expected a bare model, found one with adapters or slots: remove(model) first"
        )
    replicate(model, ranges)
