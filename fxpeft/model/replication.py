"""Layers of a transformer repeated, with their weights shared: a deeper model in the memory of the one that it was.

That is what ``layer_replication`` of a LoRA means, whose layers have factors each of their own (PEFT's
``replicate_layers``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from fxpeft.errors import AdapterError, short
from fxpeft.model.wrappers import unwrap

LISTS = ("layers", "encoder.layer", "h")  # where Llama, BERT and Falcon, and models like these, have them


def check_ranges(ranges: Any) -> list[list[int]]:
    """Ranges of layers ``[start, end)``.

    Raises:
        AdapterError: they are none.
    """
    pairs = list(ranges) if isinstance(ranges, list | tuple) else []
    found = [list(pair) for pair in pairs if isinstance(pair, list | tuple)]
    whole = all(len(p) == 2 and all(type(n) is int for n in p) and 0 <= p[0] < p[1] for p in found)
    if not found or len(found) != len(pairs) or not whole:
        raise AdapterError(
            "layer_replication: expected ranges of layers, as [[0, 4], [2, 5]] for 0 1 2 3 2 3 4, "
            f"found {short(ranges)}"
        )
    return found


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
    """Repeat a bare model's layers; their weights are shared, and its config says how many there are.

    Raises:
        AdapterError: no layers are found where PEFT looks for them, or not so many.
    """
    owner, name, layers = _layers(model)
    pairs = check_ranges([list(pair) for pair in ranges])
    if (last := max(end for _, end in pairs) - 1) >= len(layers):
        raise AdapterError(f"layer_replication: the model has {len(layers)} layers, found number {last}")
    order = list(chain.from_iterable(range(*pair) for pair in pairs))
    made = []
    for place, number in enumerate(order):
        shared: dict[int, Any] = {id(parameter): parameter for parameter in layers[number].parameters()}
        layer = copy.deepcopy(layers[number], shared)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = place
        made.append(layer)
    setattr(owner, name, nn.ModuleList(made))
    for config in _configs(model, owner):
        if (types := getattr(config, "layer_types", None)) is not None:
            config.layer_types = [types[number] for number in order]
        if hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = len(made)


def check_replicated(model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
    """Refuse a model whose layers aren't repeated so.

    Raises:
        AdapterError: they aren't.
    """
    _, _, layers = _layers(model)
    weights = [id(next(layer.parameters(), layer)) for layer in layers]
    as_many = sum(end - start for start, end in ranges) == len(layers)  # a file can name ranges without end
    order = list(chain.from_iterable(range(*pair) for pair in ranges)) if as_many else []
    same = as_many and all(
        (weights[one] == weights[other]) == (order[one] == order[other])
        for one in range(len(order))
        for other in range(one)
    )
    if not same:
        asked = short([list(pair) for pair in ranges])
        raise AdapterError(
            f"layer_replication={asked}: expected a model whose layers are repeated so, found {len(layers)} layers "
            f"that aren't: call fxpeft.replicate_layers(model, {asked}) on the bare model first"
        )


def _layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    whole = owner = unwrap(model)
    for inner in ("model", "bert"):
        while isinstance(getattr(owner, inner, None), nn.Module):
            owner = getattr(owner, inner)
    for path in LISTS:
        *parents, name = path.split(".")
        at: Any = owner
        for parent in parents:
            at = getattr(at, parent, None)
        if isinstance(layers := getattr(at, name, None), nn.ModuleList):
            return at, name, layers
    raise AdapterError(
        f"layer_replication: expected layers at one of {', '.join(LISTS)} of the inner model, as in PEFT; "
        f"{type(whole).__name__} has none"
    )


def _configs(model: nn.Module, owner: nn.Module) -> list[Any]:
    found = (getattr(module, "config", None) for module in (unwrap(model), owner))
    return list({id(config): config for config in found if config is not None}.values())
