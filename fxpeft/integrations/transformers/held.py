"""The adapters that a model holds, their tensors under the names that Transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from fxpeft.adapters.gathering import whole_adapter
from fxpeft.adapters.saving import adapter_tensors
from fxpeft.adapters.state import Adapter, ModelState, state_of
from fxpeft.errors import AdapterError
from fxpeft.integrations.transformers.model_state import adapters_of
from fxpeft.methods import method_of
from fxpeft.methods.base import Method
from fxpeft.methods.values import Values
from fxpeft.model.wrappers import plain_name
from fxpeft.passes.base import join


def loaded_state(model: nn.Module) -> ModelState:
    """What a model with adapters holds; ``ValueError`` where it has none, in Transformers' words."""
    if not adapters_of(model):
        raise ValueError("No adapter loaded. Please load an adapter first.")
    return state_of(model)


def held_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None) -> Adapter:
    """The adapter of that name, whole; its values taken from ``state_dict`` where that is given.

    Raises:
        ValueError: no such adapter, or not all of its values are in ``state_dict``.
    """
    adapter = state_of(model).get(name)
    if state_dict is None or not adapter.parts:  # served from slots, an adapter is in no state_dict
        return whole_adapter(model, adapter)
    return replace(adapter, values=_values_in(adapter, state_dict), parts={})


def without_prefix(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors as Transformers keys them; keys with another prefix stay, as those of prompts do in PEFT."""
    tensors = adapter_tensors(adapter)
    if method_of(adapter.config).prefix != Method.prefix:
        return tensors
    return {key.removeprefix(Method.prefix): value for key, value in tensors.items()}


def only_active(model: nn.Module) -> str:
    """The name of the first active adapter; ``ValueError`` where none is active."""
    state = loaded_state(model)
    if not state.active:
        raise AdapterError(f"no adapter is active; set_adapter one of {', '.join(state.adapters)}")
    return state.active[0]


def _values_in(adapter: Adapter, state_dict: Mapping[str, Tensor]) -> Values:
    tensors = {plain_name(key): tensor for key, tensor in state_dict.items()}

    def take(host: str, key: str) -> Tensor:
        path = join(host, "adapters", adapter.name, key)
        if path not in tensors:
            raise AdapterError(f"{path}: expected in state_dict, found none; pass the state_dict of this very model")
        return tensors[path].detach()

    def place(site: str, key: str) -> tuple[str, str]:
        kind = adapter.plan.sites[site].kind
        return kind.host(site), join(kind.leaf, key)

    own = adapter.values
    return Values(
        {site: {key: take(*place(site, key)) for key in parts} for site, parts in own.sites.items()},
        {path: {key: take(path, key) for key in parts} for path, parts in own.saved.items()},
        {path: take(path.rpartition(".")[0], path.rpartition(".")[2]) for path in own.tensors},
        {name: take(*place(next(iter(own.sites)), f"shared.{name}")) for name in own.shared},
        {name: take(name, "rows") for name in own.tokens},
    )
