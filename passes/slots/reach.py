"""Reach: the tokens of a call that an adapter acts on, for one that acts from some tokens on (aLoRA).

The scale of an update is zero at the tokens that the adapter doesn't reach. Which those are is data of the call, in the
shape of its tokens: adapters come and go, and invocations lie elsewhere in each prompt, in one compiled graph. Where
rows have adapters of their own, each rank of a row has the place of the token that it acts from on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.passes.targets.one_node import one_node


def everywhere(*sizes: int, device: torch.device | None = None) -> Tensor:
    """All tokens; without sizes those of a call whose tokens nobody told."""
    return torch.ones(sizes or (0, 0), dtype=torch.bool, device=device)


def nowhere() -> Tensor:
    """No token of a call."""
    return torch.ones(0, 1, dtype=torch.bool)


class Reach:
    """Of an adapter's calls without slots: it is the last one's, so that the backward of that has it.

    ``mask``: ``[rows, tokens]``, or :func:`everywhere` or :func:`nowhere` of a call whose tokens aren't known.
    ``kept``: how many of them, the last ones, a head sees, where the call says so. ``rows``: which of its rows are
    computed now, where they are taken apart. ``seen``: what its owner is to remember.
    """

    rows: Tensor | None = None
    kept = 0

    def __init__(self) -> None:
        self.mask, self.seen = nowhere(), None  # type: Tensor, Any


class ThreadReach(threading.local):
    """Of a prepared model's calls, each thread's own.

    Its attributes are set anew for each thread: see :class:`fxpeft.passes.slots.lanes.Lanes`.

    ``told``: what its owner knows of the call that is under way. ``tokens``: for what invocation the mask was found.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No call is under way."""
        self.mask: Tensor = everywhere()
        self.kept = 0  # as of a Reach
        self.told: Any = None
        self.tokens: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadReach, ()


class LaneReach(NamedTuple):
    """Of a call whose rows have adapters of their own: where each rank begins to act.

    ``packed``: ``[rows, r]``, and ``own``: ``[rows, w]``, the places of the first tokens, for the ranks of the mask and
    for a row's own; those of an adapter that acts everywhere are 0. ``places``: ``[tokens]``, of the call's; a single
    one, ``[]``, where nobody told the tokens; none, ``[0]``, where each token has a name, and so acts. ``kept``: as of
    a :class:`Reach`.
    """

    packed: Tensor
    own: Tensor
    places: Tensor
    kept: int = 0


@dataclass(frozen=True, eq=False)
class ReachAt:
    """The reach of the calls of one site.

    Args:
        site: its name, for messages.
    """

    calls: Reach | ThreadReach
    site: str


@one_node
def reached(at: ReachAt | Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """A scale, one or one for each rank, at the tokens of an input ``[rows, tokens, in]`` that are reached, else zero.

    Args:
        at: what knows the call's; in a program, where an input says it, ``[rows, tokens]`` of its tokens.

    Returns:
        ``[rows, tokens, 1 or rank]``; of an input whose rows and tokens are one dimension ``[rows * tokens, ...]``.

    Raises:
        AdapterError: the site doesn't see the call's tokens.
    """
    if isinstance(at, Tensor):
        return _where(at.reshape(-1) if x.ndim == 2 else at, x, scale)
    mask = at.calls.mask
    if mask.shape[0] == 0:
        return scale if mask.shape[1] == 0 else torch.zeros_like(scale)
    if isinstance(at.calls, Reach) and at.calls.rows is not None:
        mask = mask.index_select(0, at.calls.rows.to(mask.device))
    leading = x.shape[:-1]
    if len(leading) == 2 and leading[1] == at.calls.kept:
        mask = mask[:, -leading[1] :]
    if len(leading) == 1 and leading[0] == mask.shape[0] * mask.shape[1]:
        mask = mask.reshape(-1)
    elif len(leading) < 2 or leading[0] != mask.shape[0] or leading[1] != mask.shape[1]:
        raise other_tokens(at.site, mask.shape, x)
    return _where(mask, x, scale)


def _where(mask: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    mask = mask.view(*mask.shape, *(1 for _ in x.shape[2:-1]), 1)
    return torch.where(mask.to(x.device), scale, 0)


def other_tokens(site: str, tokens: Sequence[int], x: Tensor) -> AdapterError:
    """What to raise where a site doesn't see the call's tokens, ``[rows, tokens]``."""
    return AdapterError(
        f"{site}: an adapter with alora_invocation_tokens acts on some of the call's {tokens[0]} x {tokens[1]} tokens, "
        f"and an input of {list(x.shape)} has others: leave the site out"
    )
