"""Rows apart: a module takes the rows of a batch group by group, each with a forward and adapters of its own.

That is for modules without slots, called without a compiler: as many calls of each module as there are groups, each of
which computes with its own rows alone, so that a row gets what it gets in a batch of its group alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.passes.container import Container
from fxpeft.passes.live.bind import bind_source
from fxpeft.passes.live.instance import base_class, given_forward
from fxpeft.passes.torch_private import pytree

APART = "_fxpeft_apart"  # where a module's groups stand
_SOURCE = f"""from {__name__} import by_groups

def forward(self, *args, **kwargs):
    return by_groups(self, args, kwargs)
"""


class Parted(NamedTuple):
    """Each group's number and its rows, and where each row of a batch is in what these give one after another."""

    picks: list[tuple[int, Tensor]]
    order: Tensor


@dataclass
class Groups:
    """Which rows of a batch belong together.

    Args:
        ids: the group of each row, ``[rows]``. repeats: how many rows of a call each may stand for, side by side, as
            beams do.
    """

    ids: Tensor
    repeats: int = 1
    _known: dict[int, Parted] = field(default_factory=dict)

    def of(self, count: int) -> Parted | None:
        """How ``count`` rows fall apart; ``None`` where the batch has another number."""
        if count not in (len(self.ids), len(self.ids) * self.repeats):
            return None
        if count not in self._known:
            ids = self.ids.repeat_interleave(count // len(self.ids))
            picks = [(number, (ids == number).nonzero().flatten()) for number in range(int(ids.max()) + 1)]
            self._known[count] = Parted(picks, torch.cat([rows for _, rows in picks]).argsort())
        return self._known[count]


@dataclass(frozen=True, eq=False)
class Own:
    """What a module computes for a group: a forward, called with the module, and the adapters' parts that it reads."""

    forward: Callable[..., Any]
    parts: Sequence[nn.Module]


def take_apart(module: nn.Module, groups: Groups, own: Sequence[Own], name: str) -> None:
    """Let a module compute each group's rows on their own; binding it anew ends that."""
    bind_source(module, _SOURCE)
    vars(module)[APART] = groups, own, name


def put_together(module: nn.Module) -> None:
    """Forget the groups; the module has to be bound anew before it is called again."""
    vars(module).pop(APART, None)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs where it isn't bound: the forward that somebody gave it, or its class's."""
    return given_forward(module) or base_class(module).forward.__get__(module)  # type: ignore[no-any-return]


def call_own(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module as if it weren't bound; it may be unbound meanwhile, by a hook of this very call."""
    return own_forward(module)(*args, **kwargs)


def by_groups(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One call of a module whose rows are taken apart.

    Raises:
        AdapterError: its inputs don't have the rows that were named.
    """
    groups, own, name = vars(module)[APART]
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    counts = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    counts -= {1} if len(counts) > 1 else set()  # what is the same for all rows
    count = counts.pop() if len(counts) == 1 else 0
    parted = groups.of(count)
    if parted is None:
        found = ", ".join(str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
        raise AdapterError(
            f"{name}: expected {len(groups.ids)} rows, as they were named, found an input of {found}: "
            "name as many as the batch has"
        )
    container = module._modules.get("adapters")
    outs = []
    for number, rows in parted.picks:
        if isinstance(container, Container):
            container.show(own[number].parts)
        given = [_rows(leaf, rows, count) for leaf in leaves] if len(parted.picks) > 1 else leaves
        own_args, own_kwargs = pytree.tree_unflatten(given, spec)
        reaches = [part.reach.calls for part in own[number].parts if hasattr(part, "reach")]
        try:
            for reach in reaches:
                reach.rows = rows
            outs.append(own[number].forward(module, *own_args, **own_kwargs))
        finally:
            for reach in reaches:
                reach.rows = None
    return outs[0] if len(outs) == 1 else _together(outs, parted.order)


def _rows(value: Any, rows: Tensor, count: int) -> Any:
    """A group's rows of a tensor that has all rows; anything else as it is."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != count:
        return value
    return value.index_select(0, rows.to(value.device))


def _together(outs: Sequence[Any], order: Tensor) -> Any:
    """The outputs of all groups as one, the rows in the batch's order."""
    flat = [pytree.tree_flatten(out) for out in outs]
    spec = flat[0][1]
    values = [
        torch.cat(parts).index_select(0, order.to(parts[0].device)) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(values, spec)
