"""Other active adapters, other scales or none for a ``with`` block; what was before comes back as one change.

Each puts back what it set and nothing else, also after an exception: an adapter that was loaded inside the block
stays. What can't be put back is left alone: an adapter that was deleted inside, or folded into the weights and left
there; and where the model was taken apart inside (``remove``, ``merge_and_unload``, the last adapter deleted) nothing
is put back. On a prepared model each is a swap: other threads compute with what is set while the block runs, and
inside a :func:`fxpeft.hold` of the same thread it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from fxpeft.adapters.api import disable_adapters, enable_adapters, set_adapter, set_scale
from fxpeft.adapters.attach import set_trainable
from fxpeft.adapters.change import changes
from fxpeft.adapters.penalty import watch_loss
from fxpeft.adapters.state import ModelState, Strength, TrainedBefore, find_state, state_of
from fxpeft.errors import AdapterError
from fxpeft.model.wrappers import unwrap


@contextmanager
def active(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """Make these adapters, and no others, the active ones inside a ``with`` block; then those that were.

    Which parameters are trained comes back too. Where adapters are switched off they stay so: this says which, not
    whether.

    Args:
        names: as in :func:`fxpeft.set_adapter`; ``[]``: none.

    Raises:
        AdapterError: as :func:`fxpeft.set_adapter`; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    before = list(state.active)
    with trained_now(model, state) as retrain:
        try:
            set_adapter(model, names)
            yield
        finally:
            activate_again(model, state, before, retrain)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the bare base model inside a ``with`` block."""
    model, state = unwrap(model), state_of(model)
    before = state.enabled
    with trained_now(model, state) as retrain:
        try:
            disable_adapters(model)
            yield
        finally:
            _enable_again(model, state, before, retrain)


@contextmanager
def scaled(model: nn.Module, scales: str | Mapping[str, float], factor: float | None = None) -> Iterator[None]:
    """Run adapters at other scales inside a ``with`` block: ``scaled(model, "a", 0.5)`` or ``{"a": 0.5, "b": 2}``.

    A factor is what :func:`fxpeft.set_scale` takes: on the adapter's own scale, in place of the one before.

    Raises:
        AdapterError: as :func:`fxpeft.set_scale`; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    if isinstance(scales, str) is (factor is None):
        raise AdapterError(f"scaled: expected a name and a factor, or names with factors, found {scales!r}, {factor!r}")
    wanted = {scales: factor} if isinstance(scales, str) else scales
    before = {name: state.get(name).strength for name in wanted}
    try:
        _set_scales(model, state, {name: scale for name, scale in wanted.items() if scale is not None})
        yield
    finally:
        _scale_again(model, state, before)


# --- what they share with ``folded`` ---


@contextmanager
def trained_now(model: nn.Module, state: ModelState) -> Iterator[Callable[[], None]]:
    """What puts back which parameters are trained: choosing adapters trains the active ones, whoever froze them.

    Adapters that nothing inside the block touches are not looked at.
    """
    if state.serving is not None:  # slots are not trained
        yield lambda: None
        return
    enabled, before = state.enabled, TrainedBefore(state.adapters)

    def put_back() -> None:
        for adapter, trained, grads in before.noted.values():
            adapter.trained = trained
            for parameter, trains in grads:
                parameter.requires_grad_(trains)
        if state.enabled != enabled:  # switched off or on inside for good: what was trained is not what has to be now
            set_trainable(state, (*before.noted, *state.active))
        if state.serving is None:
            watch_loss(model, state)

    state.notes.append(before)
    try:
        yield put_back
    finally:
        state.notes.remove(before)


@changes
def activate_again(model: nn.Module, state: ModelState, names: Sequence[str], retrain: Callable[[], None]) -> None:
    """Make those of the adapters active that still can be; nothing where the state is no longer the model's."""
    if find_state(model) is not state:
        return
    inside = state.in_weights()
    left = [name for name in names if name in state.adapters and name not in inside]
    if state.active != left:
        set_adapter(model, left)
    retrain()


@changes
def _enable_again(model: nn.Module, state: ModelState, enabled: bool, retrain: Callable[[], None]) -> None:
    if find_state(model) is not state:
        return
    if state.enabled is not enabled:
        (enable_adapters if enabled else disable_adapters)(model)
    retrain()


@changes
def _set_scales(model: nn.Module, state: ModelState, scales: Mapping[str, Strength]) -> None:
    for name, scale in scales.items():
        if state.get(name).strength != scale:
            set_scale(model, name, scale)


@changes
def _scale_again(model: nn.Module, state: ModelState, scales: Mapping[str, Strength]) -> None:
    if find_state(model) is not state:
        return
    inside = state.in_weights()
    _set_scales(model, state, {n: s for n, s in scales.items() if n in state.adapters and n not in inside})
