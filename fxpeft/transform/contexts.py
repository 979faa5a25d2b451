"""Adapters in the base's weights for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from fxpeft.adapters.change import changes
from fxpeft.adapters.contexts import activate_again, trained_now
from fxpeft.adapters.state import ModelState, find_state, state_of
from fxpeft.errors import AdapterError
from fxpeft.model.wrappers import unwrap
from fxpeft.transform.folding import fold, fold_instead, refold, take_out


@contextmanager
def folded(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    keep: Literal["original", "delta"] = "original",
    safe: bool = False,
) -> Iterator[None]:
    """Fold adapters for a ``with`` block, whose forward is the bare model's; then weights and adapters are as before.

    On a model that has folded adapters already it is a :func:`fxpeft.refold`, these in the place of those, which
    come back after. What you write into folded weights inside the block is lost.

    Args:
        names: which adapters. Default: those that take part in the forward, folded ones too, so that the outputs stay.
        keep: as in :func:`fxpeft.fold`; with ``"delta"`` the weights come back to within rounding. Where something
            is folded already, its own stays.
        safe: refuse NaN and infinity.

    Raises:
        AdapterError: as :func:`fxpeft.fold`; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    if keep not in ("original", "delta"):
        raise AdapterError(f"keep: expected 'original' or 'delta', with which there is a way back, found {keep!r}")
    before = None if state.folded is None else list(state.folded.names)
    active = list(state.active)
    with trained_now(model, state) as retrain:
        try:
            if before is None:
                fold(model, names, keep=keep, safe=safe)
            else:
                refold(model, [*before, *active] if names is None else names, safe=safe)
            yield
        finally:
            _unfold_again(model, state, before, active, retrain)


@changes
def _unfold_again(
    model: nn.Module, state: ModelState, before: list[str] | None, active: list[str], retrain: Callable[[], None]
) -> None:
    """Fold what was folded, without what was deleted or folded for good since; nothing where the state is another."""
    if find_state(model) is not state:
        return
    now = None if state.folded is None else state.folded.names
    on = [name for name in active if name in state.adapters and name not in state.baked]
    if before is None and now is not None:
        take_out(model, state, on)
    elif before is not None:
        wanted = [name for name in before if name in state.adapters and name not in state.baked]
        if wanted != now:
            fold_instead(model, state, wanted, [name for name in on if name not in wanted], safe=False)
    activate_again(model, state, active, retrain)
