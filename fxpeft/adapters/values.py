"""An adapter's values before they are in a model: fresh ones, and a checkpoint's on the devices of their modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.base import Base
from fxpeft.methods.tokens import starts_from_rows
from fxpeft.methods.values import Values
from fxpeft.model.placement import home, placement
from fxpeft.model.progress import progress
from fxpeft.model.walk import base_state, base_value, base_values, site_module
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError, attribute, join
from fxpeft.targets.sites import AdapterPlan


def fresh_values(model: nn.Module, plan: AdapterPlan, *, autocast: bool) -> Values:
    """First values of a new adapter."""
    method, config = method_of(plan.config), plan.config
    values = Values()
    for path in plan.saved:
        state = base_values(submodule(model, path))
        values.saved[path] = {key: tensor.detach().clone() for key, tensor in state.items()}
    for path in (*plan.tensors, *plan.weights):
        values.tensors[path] = base_value(model, path).detach().clone()
    for name, own in plan.tokens.items():
        if not own.tied:
            values.tokens[name] = _fresh_rows(model, name, plan, autocast)
    shapes = method.shared(config, plan.sites)
    if shapes:
        device, dtype = shared_placement(model, plan.sites, autocast)
        values.shared = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        method.initialise_shared(config, values.shared)
    brings = values.own()
    for site, site_plan in progress(plan.sites.items(), "first values"):
        module, leaf = site_module(model, site)
        device, dtype = placement(module, model, autocast, leaf)
        base = Base(module, brings.get(site, {}), shared=values.shared)
        try:
            values.sites[site] = method.fresh(config, site_plan, base, device=device, dtype=dtype)
        except PassError as error:
            raise AdapterError(f"{site}: the base's weight gives no first values: {error}") from None
    tie(values, plan)
    return values


def _fresh_rows(model: nn.Module, name: str, plan: AdapterPlan, autocast: bool) -> Tensor:
    module = submodule(model, name)
    device, dtype = placement(module, model, autocast)
    try:
        rows = plan.tokens[name].fresh(
            base_value(model, join(name, "weight")), random=not starts_from_rows(plan.config)
        )
    except PassError as error:
        raise AdapterError(f"{name}: the base's weight gives no first rows: {error}") from None
    return rows.to(device=device, dtype=dtype)


def tie(values: Values, plan: AdapterPlan) -> None:
    """Let sites that follow another have its factors: views of them, so that what trains the one trains the other."""
    for name, first in plan.tied.items():
        if name in values.sites and first in values.sites:
            looked_up = values.sites[first]
            factors = {"lora_A": looked_up["lora_B"].t(), "lora_B": looked_up["lora_A"].t()}
            values.sites[name] = {**values.sites[name], **factors}


def complete(values: Values, fresh: Values) -> None:
    """Fill the places that a checkpoint left empty with a fresh adapter's values."""
    for own, first in ((values.sites, fresh.sites), (values.saved, fresh.saved)):
        for path, parts in first.items():
            own[path] = {key: own.get(path, {}).get(key, value) for key, value in parts.items()}
    values.tensors = {**fresh.tensors, **values.tensors}
    values.shared = {**fresh.shared, **values.shared}
    values.tokens = {**fresh.tokens, **values.tokens}


def shared_placement(model: nn.Module, sites: Iterable[str], autocast: bool) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of what all sites share: those of the first one."""
    module, leaf = site_module(model, next(iter(sites)))
    return placement(module, model, autocast, leaf)


def placed(model: nn.Module, values: Values, *, autocast: bool) -> Values:
    """A checkpoint's values on the devices of their modules, in memory of their own."""
    out = Values()
    for site, parameters in values.sites.items():
        module, leaf = site_module(model, site)
        device, _ = placement(module, model, autocast, leaf)
        out.sites[site] = {key: _cast(value, device, autocast) for key, value in parameters.items()}
    for path, parts in values.saved.items():
        module = submodule(model, path)
        own = base_state(module)
        out.saved[path] = {key: _beside(value, own[key], module) for key, value in parts.items()}
    for path, value in values.tensors.items():
        out.tensors[path] = _beside(value, attribute(model, path), submodule(model, path.rpartition(".")[0]))
    for name, rows in values.tokens.items():
        out.tokens[name] = _cast(rows, placement(submodule(model, name), model, autocast)[0], autocast)
    if values.shared:
        device, _ = shared_placement(model, values.sites, autocast)
        out.shared = {name: _cast(value, device, autocast) for name, value in values.shared.items()}
    return out


def _beside(value: Tensor, own: Tensor, module: nn.Module) -> Tensor:
    return value.to(device=home(own, module), dtype=own.dtype, copy=True)


def _cast(value: Tensor, device: torch.device, autocast: bool) -> Tensor:
    half = value.dtype in (torch.float16, torch.bfloat16)
    if device.type == "meta":  # the base has no memory yet, and the values would be lost there
        device = value.device
    return value.to(device=device, dtype=torch.float32 if autocast and half else value.dtype, copy=True)
