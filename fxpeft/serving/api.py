"""The verbs of a prepared model alone: replace an adapter by another, keep swaps out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.adapters.agreement import change_of_parts
from fxpeft.adapters.change import changing, ordinary
from fxpeft.adapters.loading import load
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.state import Adapter, ModelState, state_of
from fxpeft.errors import AdapterError
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.model.wrappers import unwrap
from fxpeft.serving.swap import serving_of


@ordinary()
def hotswap(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    name: str | None = None,
    *,
    config: AdapterConfig | None = None,
    allow_pickle: bool = False,
    check_finite: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = False,
    partial: bool = False,
    weight_name: str | None = None,
    component: str | None = None,
) -> None:
    """Replace an adapter of a prepared model by another one. Nothing recompiles.

    Everything is checked before the first byte of a slot is written. If anything fails, the old
    adapter goes on serving. Where processes hold parts of the model, all of them call this between the same
    forwards, with the same adapter: they swap together, or none of them does.

    Args:
        source: a folder or hub id as in :func:`fxpeft.load_adapter`, or a state_dict with PEFT's keys.
        name: the adapter to replace; the active one by default.
        config: for a state_dict: its config. Default: the replaced adapter's.
        check_finite: refuse NaN and infinity.
        key_mapping, strict, partial, weight_name, component: as in :func:`fxpeft.load_adapter`.

    Raises:
        AdapterError: the model is not prepared, or the adapter doesn't fit its slots; or another process failed.
    """
    model, state = unwrap(model), state_of(model)
    serving_of(state)
    _replaced(state, name)  # what is wrong with it is told before files are read
    with change_of_parts(model) as agreement:
        given = None if isinstance(source, Mapping) else checkpoint.read(
            source, allow_pickle=allow_pickle, revision=revision, subfolder=subfolder, token=token,
            local_files_only=local_files_only, strict=strict, weight_name=weight_name, component=component,
        )  # fmt: skip
        with changing(model):
            state = state_of(model)
            old = _replaced(state, name)
            found = given or checkpoint.Checkpoint("the state_dict", config or old.config, dict(source))  # type: ignore[arg-type]
            modules = Modules(model)
            found = checkpoint.for_model(modules, found)
            agreement.step(found)
            plan, values = load(modules, found, key_mapping=key_mapping, check_finite=check_finite, partial=partial)
            new = Adapter(old.name, plan, values, old.strength)
            serving_of(state).replace(model, state, new, owned=given is not None)
            agreement.step(last=True)


def _replaced(state: ModelState, name: str | None) -> Adapter:
    """The adapter that a hotswap replaces."""
    if name is None:
        if len(state.active) != 1:
            raise AdapterError(f"{len(state.active)} adapters are active; say which to replace: {list(state.adapters)}")
        name = state.active[0]
    old = state.get(check_adapter_name(name))
    state.check_unfolded([name], "it can't be replaced")
    return old


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Keep swaps of other threads out of a ``with`` block, so that all of it sees one adapter.

    Calls of the model, of its parts and of ``generate`` need no help: each holds the lock on its own, eager or
    compiled with ``torch.compile(model)``. Only where the model is inlined into a larger compiled function, that
    function's call has to be held with this. Inside the block this thread can't swap, and must not wait for other
    threads that call the model: they wait for a waiting swap, which waits for this block.

    Raises:
        LockTimeout: a swap took longer than ``prepare_hotswap(..., lock_timeout=)``.
    """
    return serving_of(state_of(model)).lock.read()
