"""Adapters from tensors in memory: put in with or without a config, with or without values, and filled later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxpeft.adapters.installing import check_name, install_adapter, replace_attached
from fxpeft.adapters.loading import fit, load
from fxpeft.adapters.restore import writing
from fxpeft.adapters.state import Adapter, is_prepared, state_of
from fxpeft.adapters.tensor_parallel import cut_as
from fxpeft.adapters.values import fresh_values, placed, shared_placement
from fxpeft.checkpoint import Checkpoint
from fxpeft.checkpoint.inferred import infer_config, peft_keys, with_sites
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.model.placement import placement
from fxpeft.model.walk import base_state, site_module
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.base import attribute
from fxpeft.targets.experts import converted
from fxpeft.targets.sites import AdapterPlan, make_plan


def inject(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    config: AdapterConfig | None = None,
    name: str = "default",
    *,
    empty: bool = False,
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    check_finite: bool = False,
) -> None:
    """Put an adapter in whose tensors are in memory, and make it the active one.

    On a base that is still on the meta device the adapter's tensors stay where they are, so that the model runs once
    the base has its own (``load_state_dict(..., assign=True)``).

    Args:
        state_dict: the adapter's tensors under PEFT's keys, as files or as PEFT's modules have them. They say which
            sites there are and of which rank. ``None``: ``config`` says it.
        config: what the tensors don't say: alpha, dropout. ``None``: see :func:`fxpeft.infer_config`.
        empty: the adapter's tensors are on the meta device until :func:`fxpeft.load_adapter_state_dict`; of
            ``state_dict`` only keys and shapes are used.
        trainable: train it further; as with :func:`fxpeft.load_adapter` it is frozen by default.

    Raises:
        AdapterError: the keys or the config don't fit the model, or each other; nothing was changed.
    """
    model = unwrap(model)
    check_name(model, name)
    if empty and is_prepared(model):
        raise AdapterError(f"empty: a slot needs values, so {name!r} can't be put into a prepared model without")
    modules = Modules(model)
    if state_dict is None:
        if config is None:
            raise AdapterError("inject: expected a state_dict or a config, found neither")
        plan = make_plan(modules, converted(modules, config))
        make = _empty_values if empty else fresh_values
        values = make(model, plan, autocast=autocast_adapter_dtype)
    else:
        tensors = peft_keys(state_dict, shapes_only=empty)
        given = Checkpoint("the state_dict", infer_config(tensors) if config is None else config, tensors)
        found = in_layout_of(modules, given)
        if found is not given:
            config = found.config
        else:
            config = infer_config(tensors, modules) if config is None else with_sites(config, tensors, modules)
        found.config = replace(config, inference_mode=not trainable)
        plan, values = fit(modules, found, check_finite=check_finite)
        autocast = autocast_adapter_dtype and not is_prepared(model)
        values = _nowhere(values) if empty else placed(model, values, autocast=autocast)
    install_adapter(model, Adapter(name, plan, values), modules)


def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], name: str | None = None, *, check_finite: bool = False
) -> None:
    """Give an adapter that the model has other values: what :func:`fxpeft.adapter_state_dict` gave, or PEFT.

    They are copied into the parameters, which an optimiser may hold; parameters of an empty adapter are made where
    their modules are now. On a prepared model it is a swap.

    Args:
        name: which adapter; the active one by default.

    Raises:
        AdapterError: no such adapter, or it is in the base's weights.
        CheckpointError: keys and shapes are not those of the adapter, or a value isn't finite; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    old = state.chosen(name)
    state.check_unfolded([old.name], "its values can't be replaced")
    found = Checkpoint("the state_dict", old.config, peft_keys(state_dict))
    _, values = load(Modules(model), found, plan=old.plan, check_finite=check_finite)
    values = placed(model, values, autocast=False)
    own = old.current()
    beside = ((own.shared, values.shared), (own.tokens, values.tokens))
    for mine, theirs in (*beside, *((own.sites[s], parts) for s, parts in values.sites.items())):
        theirs.update({k: v.to(mine[k].dtype) for k, v in theirs.items() if k in mine})
    new = Adapter(old.name, old.plan, values, old.strength)
    if state.serving is not None:
        state.serving.replace(model, state, new, owned=True)
    elif any(parameter.is_meta for parameter in old.parameters()) or not _same_parts(old, values):
        replace_attached(model, state, new)
    else:
        overwrite(old, values)


def overwrite(adapter: Adapter, values: Values) -> None:
    """Copy values into an adapter's parameters, which an optimiser or a compiled graph may hold."""
    new, own = values.flat(), adapter.current().flat()
    with writing(own.values()), torch.no_grad():
        for place, tensor in own.items():
            tensor.copy_(cut_as(new[place], tensor))


def _same_parts(adapter: Adapter, values: Values) -> bool:
    """Whether an adapter has parameters for all values: a prompt's encoder, say, is no value of a file."""
    return adapter.current().flat().keys() == values.flat().keys()


def _empty_values(model: nn.Module, plan: AdapterPlan, *, autocast: bool) -> Values:
    """A new adapter's tensors, without memory."""
    method, values = method_of(plan.config), Values()
    for site, own in plan.sites.items():
        module, leaf = site_module(model, site)
        _, dtype = placement(module, model, autocast, leaf)
        shapes = method.shapes(plan.config, own)
        values.sites[site] = {n: torch.empty(s, dtype=method.dtype(n, dtype), device="meta") for n, s in shapes.items()}
    shared = method.shared(plan.config, plan.sites)
    values.shared = {n: torch.empty(shape, dtype=shared_placement(model, plan.sites, autocast)[1], device="meta")
                     for n, shape in shared.items()}  # fmt: skip
    values.tokens = {
        name: torch.empty(own.shape, dtype=placement(submodule(model, name), model, autocast)[1], device="meta")
        for name, own in plan.tokens.items()
        if not own.tied
    }
    values.saved = {path: base_state(submodule(model, path)) for path in plan.saved}
    values.tensors = {path: attribute(model, path) for path in (*plan.tensors, *plan.weights)}
    return _nowhere(values)


def _nowhere(values: Values) -> Values:
    """The same shapes and dtypes on the meta device."""
    return values.each(lambda tensor: tensor.detach().to("meta"))
