"""The adapters of a live model: add, load, activate, switch off, delete, remove."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fxpeft.adapters.change import changes, changing, ordinary
from fxpeft.adapters.embeddings import SaveEmbeddings, embedding_tensors
from fxpeft.adapters.inplace import exchange
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.penalty import unwatch_loss, watch_loss
from fxpeft.adapters.plain import has_to_be_plain
from fxpeft.adapters.plain import plain as as_plain
from fxpeft.adapters.state import (
    Adapter,
    ModelState,
    Values,
    attach,
    check_together,
    detach,
    drop_state,
    ensure_state,
    find_state,
    home,
    hosts,
    is_prepared,
    only_active,
    placement,
    rebind,
    set_trainable,
    state_of,
    unwrap,
)  # fmt: skip
from fxpeft.checkpoint import peft as checkpoint
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.checkpoint.model_card import write_card
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import Base, SiteAdapter
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.prompts import PromptMethod
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError, attribute
from fxpeft.passes.live import unbind
from fxpeft.serving import prepare as serving
from fxpeft.serving.guard import unguard_forwards
from fxpeft.serving.swap import activate
from fxpeft.targets.experts import converted
from fxpeft.targets.sites import AdapterPlan, base_state, base_value, base_values, make_plan, site_module


@changes
def add_adapter(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, autocast_adapter_dtype: bool = True
) -> None:
    """Add a fresh adapter, make it the active one and freeze the base.

    Args:
        model: any module; it is changed in place and keeps its names and weights.
        config: for instance a :class:`fxpeft.LoraConfig`; a copy is kept.
        name: up to 128 of A-Z, a-z, 0-9, _ and -, the first one no -.
        autocast_adapter_dtype: keep parameters in float32 where the base is in half precision.

    Raises:
        AdapterError: the name is taken or the config doesn't fit the model; nothing was changed.
    """
    model = unwrap(model)
    check_name(model, name)
    plan = make_plan(model, converted(model, config))
    install_adapter(model, Adapter(name, plan, fresh_values(model, plan, autocast=autocast_adapter_dtype)))


@ordinary()
def load_adapter(
    model: nn.Module,
    source: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    allow_pickle: bool = False,
    check_finite: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = False,
) -> None:
    """Load an adapter that fxpeft or PEFT saved, and make it the active one.

    Args:
        source: a folder, or an id on the Hugging Face hub.
        trainable: train it further; a loaded adapter is frozen by default.
        allow_pickle: read an ``adapter_model.bin`` that holds more than tensors too. Unpickling it runs code from
            the file: only for files that you trust.
        check_finite: refuse NaN and infinity.
        key_mapping: for files whose modules had other names than Transformers' table knows: regular expression ->
            replacement, in keys without the prefix ``base_model.model.``.
        ignore_mismatched_sizes: give places for which the file has a tensor of another shape the values of a
            fresh adapter, or the base's, with a warning that names them.
        revision, subfolder, token, local_files_only: as in ``huggingface_hub``.
        strict: refuse a config with fields that fxpeft doesn't know, rather than warn.

    Raises:
        CheckpointError: missing, damaged, foreign or mismatching files; every key that was not
            used and every site that was not filled is named, and nothing was changed.
    """
    model = unwrap(model)
    check_name(model, name)
    found = checkpoint.read(
        source, allow_pickle=allow_pickle, revision=revision, subfolder=subfolder, token=token,
        local_files_only=local_files_only, strict=strict,
    )  # fmt: skip
    found.config.inference_mode = not trainable
    with changing(model):
        found = in_layout_of(model, found, key_mapping=key_mapping)
        plan = make_plan(model, found.config, heads=False, of_file=True)
        misfit = checkpoint.Misfit() if ignore_mismatched_sizes else None
        values = checkpoint.assign(model, plan, found, check_finite=check_finite, misfit=misfit)
        autocast = autocast_adapter_dtype and not is_prepared(model)  # slots have the base's dtype: nothing to gain
        if misfit is not None and (misfit.missing or misfit.unexpected):
            checkpoint.assign(model, plan, found)  # whose error names them
        if misfit is not None and misfit.mismatched:
            complete(values, fresh_values(model, plan, autocast=autocast))
            lines = (f"{key}: expected {list(own)}, found {list(theirs)}" for key, theirs, own in misfit.mismatched)
            warnings.warn(f"{source}: tensors of other shapes were left out:\n{listing(lines)}", stacklevel=3)
        install_adapter(model, Adapter(name, plan, placed(model, values, autocast=autocast)))


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    plain: bool | None = None,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format, atomically.

    Beside them lies a model card, ``README.md``, whose metadata names the base model; text that is there stays.

    Args:
        path: a folder, made where missing.
        name: which adapter; the active one by default.
        plain: write a LoRA with ``init_lora_weights=True``, which needs nothing but the base. One
            that started with PiSSA or OLoRA has twice the rank then; ``False`` keeps its rank, and
            loading it decomposes the base's weights again. Default: only where loading could not
            find the start again, as with ``pissa_niter_N``.
        save_embedding_layers: write the base's input and output embeddings too, as PEFT does; ``"auto"``: those that
            are targets, and both where the vocabulary was resized.

    Raises:
        AdapterError: no such adapter, or it is no plain LoRA of the base.
    """
    state = state_of(model)
    adapter = state.get(name if name is not None else only_active(state))
    if plain or (plain is None and has_to_be_plain(unwrap(model), adapter)):
        adapter = as_plain(adapter)
    embeddings = embedding_tensors(unwrap(model), adapter, save_embedding_layers)
    checkpoint.write(path, unwrap(model), adapter, checkpoint.to_tensors(adapter) | embeddings)
    write_card(path, unwrap(model), adapter.config)


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's checkpoint keys; they share memory with the adapter."""
    state = state_of(model)
    return checkpoint.to_tensors(state.get(name if name is not None else only_active(state)))


@changes
def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters, and no others, the active ones; their updates add up.

    On a model prepared with :func:`fxpeft.prepare_hotswap` this is a copy into the slots.
    """
    model, state = unwrap(model), state_of(model)
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    adapters = [state.get(name) for name in wanted]
    state.check_unfolded(wanted, "activating it would add it twice")
    check_together(adapters)
    if state.serving is not None:
        activate(model, state, adapters if state.enabled else [])
        state.active = wanted
        return
    switch(model, state, wanted, state.enabled)


def loaded_adapters(model: nn.Module) -> list[str]:
    """Names of all adapters that the model has, in the order they came; none on a bare model."""
    state = find_state(model)
    return [] if state is None else list(state.adapters)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters, in order; also while they are disabled."""
    return list(state_of(model).active)


def adapter_config(model: nn.Module, name: str | None = None) -> AdapterConfig:
    """A copy of an adapter's config, the active one's by default; after a hotswap, the new one's."""
    state = state_of(model)
    return copy.deepcopy(state.get(name if name is not None else only_active(state)).config)


def enable_adapters(model: nn.Module) -> None:
    """Let the active adapters take part in the forward again."""
    _set_enabled(model, True)


def disable_adapters(model: nn.Module) -> None:
    """Run the bare base model until :func:`enable_adapters`. Until then no adapter is trained, as in PEFT."""
    _set_enabled(model, False)


@changes
def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiply an adapter's own scale (alpha / rank) by ``scale``; 1 is the adapter as trained.

    Recompiles nothing: scales are tensors.
    """
    model, state = unwrap(model), state_of(model)
    adapter = state.get(name)
    state.check_unfolded([name], "its scale can't be changed")
    if not method_of(adapter.config).scales(adapter.config):
        raise AdapterError(f"adapter {name!r}: {method_of(adapter.config).name} has no scale to change")
    if state.serving is not None:
        serving.rescale(model, state, name, scale)
        return
    adapter.strength = scale
    for part in adapter.parts.values():
        if isinstance(part, SiteAdapter):
            part.set_strength(scale)


@changes
def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter. Where it was active, the others that were stay so."""
    model, state = unwrap(model), state_of(model)
    adapter = state.get(name)
    if state.folded is not None:
        state.check_unfolded([n for n in state.folded.names if n == name], "it can't be deleted")
    if name in state.active:
        set_adapter(model, [n for n in state.active if n != name])
    del state.adapters[name]
    state.baked = [n for n in state.baked if n != name]
    if state.serving is None:
        detach(model, adapter)
        watch_loss(model, state)
    if not state.adapters and state.serving is None and state.folded is None:
        drop_state(model)


@changes
def remove(model: nn.Module) -> None:
    """Take everything out of the model that fxpeft put in: it is then what it was before.

    Classes, ``state_dict``, ``requires_grad`` and outputs are bit-identical to the bare model's. Folded
    adapters are unfolded; only what was folded with ``keep=None`` stays in the weights.
    """
    model, state = unwrap(model), state_of(model)
    bare = {} if state.folded is None else state.folded.bare(model)
    if state.serving is not None:
        serving.release_slots(model, state, state.serving)
    else:
        for adapter in state.adapters.values():
            for module in hosts(model, [adapter]).values():
                unbind(module)
            detach(model, adapter)
    exchange(model, bare)
    unwatch_loss(model)
    drop_state(model)
    unguard_forwards(model)


# --- what add, load and hotswap share ---


def check_name(model: nn.Module, name: str) -> str:
    """A name that an adapter can have (:func:`fxpeft.adapters.name.check_adapter_name`) and that is not taken."""
    check_adapter_name(name)
    state = find_state(model)
    if state is not None and name in state.adapters:
        raise AdapterError(f"there is an adapter named {name!r} already; delete_adapter it, or replace it with hotswap")
    return name


def fresh_values(model: nn.Module, plan: AdapterPlan, *, autocast: bool) -> Values:
    """First values of a new adapter."""
    method, config = method_of(plan.config), plan.config
    values = Values()
    for path in plan.saved:
        state = base_values(submodule(model, path))
        values.saved[path] = {key: tensor.detach().clone() for key, tensor in state.items()}
    for path in (*plan.tensors, *plan.weights):
        values.tensors[path] = base_value(model, path).detach().clone()
    for site, site_plan in plan.sites.items():
        module, leaf = site_module(model, site)
        device, dtype = placement(module, model, autocast, leaf)
        if isinstance(method, PromptMethod):
            values.sites[site] = method.fresh(model, config, site_plan, device)
            continue
        shapes = method.shapes(config, site_plan)
        parameters = {key: torch.empty(shape, device=device, dtype=dtype) for key, shape in shapes.items()}
        base = Base(module, values.own(site))
        try:
            method.initialise(config, site_plan, parameters, base)
        except PassError as error:
            raise AdapterError(f"{site}: the base's weight gives no first values: {error}") from None
        values.sites[site] = parameters
    return values


def complete(values: Values, fresh: Values) -> None:
    """Fill the places that a checkpoint left empty with a fresh adapter's values."""
    for own, first in ((values.sites, fresh.sites), (values.saved, fresh.saved)):
        for path, parts in first.items():
            own[path] = {key: own.get(path, {}).get(key, value) for key, value in parts.items()}
    values.tensors = {**fresh.tensors, **values.tensors}


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
    return out


@changes
def install_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put a finished adapter into the model and make it the active one."""
    fresh = find_state(model) is None
    state = ensure_state(model)
    if state.serving is not None:
        serving.install(model, state, adapter)
        return
    attach(model, adapter)
    state.adapters[adapter.name] = adapter
    try:
        switch(model, state, [adapter.name], state.enabled)
    except BaseException as error:
        del state.adapters[adapter.name]
        detach(model, adapter)
        if fresh:
            drop_state(model)
        if isinstance(error, PassError):
            raise AdapterError(str(error)) from None
        raise


@changes
def replace_attached(model: nn.Module, state: ModelState, new: Adapter) -> None:
    """Put an adapter in the place of an attached one of the same name; on an error the old one is back."""
    old = state.get(new.name)
    touched = hosts(model, [old, new])
    check_together([new if name == new.name else state.adapters[name] for name in state.active])
    detach(model, old)
    try:
        attach(model, new)
        state.adapters[new.name] = new
        rebind(touched, state.running())
    except BaseException:
        detach(model, new)
        attach(model, old)
        state.adapters[old.name] = old
        rebind(touched, state.running())
        raise
    set_trainable(state, [new.name])
    watch_loss(model, state)


def switch(model: nn.Module, state: ModelState, names: list[str], enabled: bool) -> None:
    """Rebind the modules of the adapters that come or go; on an error everything is bound as before."""
    old, old_enabled = state.active, state.enabled
    touched = hosts(model, [state.adapters[n] for n in dict.fromkeys((*old, *names)) if n in state.adapters])
    state.active, state.enabled = names, enabled
    try:
        rebind(touched, state.running())
    except BaseException:
        state.active, state.enabled = [n for n in old if n in state.adapters], old_enabled
        rebind(touched, state.running())
        raise
    named = [name for name, adapter in state.adapters.items() if adapter.trained is not None]
    if enabled == old_enabled:  # adapters were chosen, not switched off or on
        for name in named:
            state.adapters[name].trained = None
    set_trainable(state, (*old, *names, *named))
    watch_loss(model, state)


@changes
def _set_enabled(model: nn.Module, enabled: bool) -> None:
    model, state = unwrap(model), state_of(model)
    if not enabled and state.folded is not None:
        state.check_unfolded(state.folded.names, "it can't be switched off")
    if state.serving is not None:
        activate(model, state, [state.adapters[n] for n in state.active] if enabled else [])
        state.enabled = enabled
    else:
        switch(model, state, state.active, enabled)


def _beside(value: Tensor, own: Tensor, module: nn.Module) -> Tensor:
    return value.to(device=home(own, module), dtype=own.dtype, copy=True)


def _cast(value: Tensor, device: torch.device, autocast: bool) -> Tensor:
    half = value.dtype in (torch.float16, torch.bfloat16)
    if device.type == "meta":  # the base has no memory yet, and the values would be lost there
        device = value.device
    return value.to(device=device, dtype=torch.float32 if autocast and half else value.dtype, copy=True)
