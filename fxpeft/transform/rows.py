"""Fold: rows of an embedding that an adapter has of its own, into the weight of everything that has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxpeft.adapters.inplace import accumulator
from fxpeft.adapters.state import Adapter
from fxpeft.methods.values import Values
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live.product import check_stored


def fold_rows(
    model: nn.Module,
    adapters: list[Adapter],
    held: Mapping[str, Values],
    writes: dict[str, Tensor],
    base: Callable[[str], Tensor],
) -> list[str]:
    """Write rows that adapters have of their own into the weights; returns why it can't be done, if so."""
    problems = []
    for adapter in adapters:
        for name, own in adapter.plan.tokens.items():
            path, rows = join(name, "weight"), held[adapter.name].tokens[own.tied or name]
            if others := [a.name for a in adapters if a is not adapter and name in a.plan.sites]:
                problems.append(f"{name}: {adapter.name} has rows of its own, {', '.join(others)} an update; fold one")
            try:
                check_stored(submodule(model, name), "weight")
            except PassError as error:
                problems.append(f"{name}: {error}")
                continue
            weight = accumulator(writes.get(path, base(path)))
            places = torch.tensor(own.tokens, device=weight.device)
            writes[path] = weight.index_copy(0, places, rows.to(weight))
    return problems
