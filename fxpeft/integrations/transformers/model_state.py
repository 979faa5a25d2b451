"""How Transformers sees that a model has adapters, and how an adapter gets into the model or its slots."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fxpeft import adapters, serving
from fxpeft.adapters.attach import set_trainable
from fxpeft.adapters.injection import overwrite
from fxpeft.adapters.installing import check_name, install_adapter, replace_attached
from fxpeft.adapters.state import Adapter, find_state, is_prepared, state_of
from fxpeft.integrations.transformers.loading import as_config
from fxpeft.methods import method_of
from fxpeft.methods.base import SiteAdapter
from fxpeft.methods.values import Values
from fxpeft.passes.slots.slot import LEAST

logger = logging.getLogger("transformers.integrations.peft")  # Transformers' own, which users filter and listen to

LOADED, CONFIGS = "_hf_peft_config_loaded", "peft_config"  # how Transformers asks for adapters


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """fxpeft's adapters on a model; empty for a bare one."""
    state = find_state(model)
    return {} if state is None else state.adapters


def belongs_to_peft(model: PreTrainedModel) -> bool:
    """Whether PEFT itself has adapted this model."""
    return not adapters_of(model) and bool(vars(model).get(CONFIGS))


# --- the attributes by which Transformers knows a model with adapters ---


def _get_loaded(self: PreTrainedModel) -> bool:
    found: bool = vars(self).get(LOADED, bool(adapters_of(self)))
    return found


def _set_loaded(self: PreTrainedModel, value: bool) -> None:
    # some models switch it off for a while, to save their base
    vars(self).pop(LOADED, None) if value and adapters_of(self) else vars(self).update({LOADED: value})


def _get_configs(self: PreTrainedModel) -> dict[str, Any]:
    own = adapters_of(self)
    if own:
        return {name: adapter.config for name, adapter in own.items()}
    if CONFIGS not in vars(self):
        raise AttributeError(f"{type(self).__name__} has no adapters")
    return vars(self)[CONFIGS]  # type: ignore[no-any-return]


def _set_configs(self: PreTrainedModel, value: dict[str, Any]) -> None:
    vars(self)[CONFIGS] = value


def _delete_configs(self: PreTrainedModel) -> None:
    vars(self).pop(CONFIGS, None)


def _get_base_model(self: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    if not adapters_of(self):  # by which some know PEFT's models
        raise AttributeError(f"{type(self).__name__} has no adapters")
    return lambda: self


PROPERTIES = {
    LOADED: property(_get_loaded, _set_loaded),
    CONFIGS: property(_get_configs, _set_configs, _delete_configs),
    "get_base_model": property(_get_base_model),
}


# --- into the model ---


def prepare(model: PreTrainedModel) -> None:
    """Give the model its slots, for the adapters that it has and for any on its linear modules."""
    wanted = model._prepare_peft_hotswap_kwargs or {}
    own = [method_of(adapter.config).declared(adapter.config) for adapter in adapters_of(model).values()]
    methods = tuple(dict.fromkeys(["lora", *own]))
    serving.prepare_hotswap(model, max(wanted["target_rank"], LEAST), targets="all-linear", methods=methods)


def train_parts(adapter: Adapter) -> None:
    """Switch an adapter's dropout on, whatever mode the model is in: Transformers' new parts are in training mode."""
    for part in adapter.parts.values():
        part.train()


def leave_slots(model: PreTrainedModel) -> None:
    """Back to parameters, to train: slots are not trained. The next frozen adapter prepares them anew."""
    if is_prepared(model):
        logger.warning(
            "Adapters that are trained can't be served from hotswap slots: the slots are taken out, so that a compiled "
            "model compiles again. To avoid that, train first, and load the adapters into a model that only serves."
        )
        serving.release_hotswap(model)


def add(model: PreTrainedModel, new: Adapter) -> None:
    """Add an adapter that was loaded and make it the active one; the first frozen one may bring the slots."""
    trains = not new.config.inference_mode
    if trains:
        leave_slots(model)
    before = list(state.active) if (state := find_state(model)) is not None else []
    install_adapter(model, new)
    if getattr(model, "_hotswap_enabled", False) and not trains and not is_prepared(model):
        try:
            prepare(model)
        except BaseException:
            adapters.delete_adapter(model, new.name)
            if before:
                adapters.set_adapter(model, before)
            raise


def others_active(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which adapters come without becoming the active ones, where there are others."""
    return adapters.active(model, adapters.active_adapters(model)) if adapters_of(model) else nullcontext()


def add_beside(model: nn.Module, name: str, config: object) -> None:
    """Add an adapter without making it the active one, where there are others.

    Args:
        config: one of fxpeft's configs or of PEFT's, for a fresh adapter; the very object that an adapter of the model
            has: for a copy of that, as TRL makes its reference.
    """
    with others_active(model):
        own = next((adapter for adapter in adapters_of(model).values() if adapter.config is config), None)
        if own is None or own.lowered:
            adapters.add_adapter(model, as_config(config), name)
        else:
            plan = replace(own.plan, config=copy.deepcopy(own.config))
            new = Adapter(check_name(model, name), plan, own.current().each(Tensor.clone), own.strength)
            install_adapter(model, new)
        train_parts(state_of(model).get(name))


def swap(model: PreTrainedModel, new: Adapter) -> None:
    """Put an adapter in the place of the one of its name: in the slots, in its parameters, or anew."""
    state = state_of(model)
    old = state.get(new.name)
    new.strength = old.strength
    if not new.config.inference_mode:
        leave_slots(model)
    if getattr(model, "_hotswap_enabled", False) and new.config.inference_mode and not is_prepared(model):
        prepare(model)
    if state.serving is not None:
        state.serving.replace(model, state, new, owned=True)  # fit copied them
    elif _same_places(old, new):
        overwrite(old, new.values)
        old.plan = new.plan
        for site, part in old.parts.items():
            if isinstance(part, SiteAdapter):
                part.plan = new.plan.sites[site]
                part.set_strength(old.strength_at(site))
        set_trainable(state)
    else:
        replace_attached(model, state, new)


def _same_places(old: Adapter, new: Adapter) -> bool:
    def shape(values: Values) -> object:
        return {place: tensor.shape for place, tensor in values.flat().items()}

    # dropout sits in the rewritten graph, so another probability is another graph
    dropout = [getattr(a.config, "lora_dropout", 0.0) for a in (old, new)]
    return shape(old.values) == shape(new.values) and dropout[0] == dropout[1]
