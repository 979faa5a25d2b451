"""The adapters of a live model: add, load, activate, switch off, delete, remove."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fxpeft import checkpoint
from fxpeft.adapters.agreement import change_of_parts
from fxpeft.adapters.attach import check_together, detach, hosts
from fxpeft.adapters.change import changes, changing, ordinary
from fxpeft.adapters.installing import check_name, install_adapter, switch
from fxpeft.adapters.loading import load
from fxpeft.adapters.penalty import watch_loss
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import (
    Adapter,
    drop_state,
    find_state,
    is_prepared,
    state_of,
)
from fxpeft.adapters.values import complete, fresh_values, placed
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import SiteAdapter
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.model.wrappers import unwrap
from fxpeft.targets.experts import converted
from fxpeft.targets.sites import make_plan


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
    modules = Modules(model)
    plan = make_plan(modules, converted(modules, config))
    install_adapter(model, Adapter(name, plan, fresh_values(model, plan, autocast=autocast_adapter_dtype)), modules)


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
    partial: bool = False,
    weight_name: str | None = None,
    component: str | None = None,
) -> None:
    """Load an adapter that fxpeft or PEFT saved, and make it the active one.

    Where processes hold parts of the model, all of them call this, and all of them load it or none does.

    Args:
        source: a folder, an id on the Hugging Face hub, or a ``.safetensors`` file of diffusers or kohya.
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
        partial: the model is a part of the one that the adapter is of, such as a pipeline's stage with half of the
            layers: tensors of modules that it lacks are left out, with a warning that names these.
        weight_name: a file in ``source`` that is none of PEFT's two, of a format that is told by its keys.
        component: of a pipeline's file, whose adapter it is: ``"unet"``, ``"text_encoder_2"``, ... Default: the one
            whose sites the model has.

    Raises:
        CheckpointError: missing, damaged, foreign or mismatching files; every key that was not
            used and every site that was not filled is named, and nothing was changed.
    """
    model = unwrap(model)
    check_name(model, name)
    with change_of_parts(model) as agreement:
        found = checkpoint.read(
            source, allow_pickle=allow_pickle, revision=revision, subfolder=subfolder, token=token,
            local_files_only=local_files_only, strict=strict, weight_name=weight_name, component=component,
        )  # fmt: skip
        with changing(model):
            modules, misfit = Modules(model), checkpoint.Misfit() if ignore_mismatched_sizes else None
            found = checkpoint.for_model(modules, found)
            found.config.inference_mode = not trainable
            agreement.step(found, last=not is_prepared(model))
            plan, values = load(
                modules, found, key_mapping=key_mapping, check_finite=check_finite, misfit=misfit, partial=partial
            )
            if misfit is not None and (misfit.missing or misfit.unexpected):
                load(modules, found, plan=plan, key_mapping=key_mapping)  # whose error names them
            autocast = autocast_adapter_dtype and not is_prepared(model)  # slots have the base's dtype: nothing to gain
            if misfit is not None and misfit.mismatched:
                complete(values, fresh_values(model, plan, autocast=autocast))
                lines = (f"{key}: expected {list(own)}, found {list(theirs)}" for key, theirs, own in misfit.mismatched)
                warnings.warn(f"{source}: tensors of other shapes were left out:\n{listing(lines)}", stacklevel=3)
            install_adapter(model, Adapter(name, plan, placed(model, values, autocast=autocast)), modules)
            agreement.step(last=True)


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
        state.serving.activate(model, state, adapters if state.enabled else [])
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
    return copy.deepcopy(state_of(model).chosen(name).config)


def enable_adapters(model: nn.Module) -> None:
    """Let the active adapters take part in the forward again."""
    _set_enabled(model, True)


def disable_adapters(model: nn.Module) -> None:
    """Run the bare base model until :func:`enable_adapters`. Until then no adapter is trained, as in PEFT."""
    _set_enabled(model, False)


@changes
def set_scale(model: nn.Module, name: str, scale: float | Mapping[str, float]) -> None:
    """Multiply an adapter's own scale (alpha / rank) by ``scale``; 1 is the adapter as trained.

    Recompiles nothing: scales are tensors.

    Args:
        scale: one for all sites, or module -> scale of the sites in it: ``{"down_blocks.1": 0.5, "mid_block": 0}``. Of
            several modules around a site the innermost counts; sites in none of them have 1.

    Raises:
        AdapterError: the method has no scale, or a module has no site of the adapter's; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    adapter = state.get(name)
    state.check_unfolded([name], "its scale can't be changed")
    if not method_of(adapter.config).scales(adapter.config):
        raise AdapterError(f"adapter {name!r}: {method_of(adapter.config).name} has no scale to change")
    if isinstance(scale, Mapping):
        scale = _of_sites(adapter, scale)
    if state.serving is not None:
        state.serving.rescale(model, state, name, scale)
        return
    before, adapter.strength = adapter.strength, scale
    try:
        _set_strengths(adapter)
    except BaseException:
        adapter.strength = before
        _set_strengths(adapter)
        raise


@changes
def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter. Where it was active, the others that were stay so."""
    model, state = unwrap(model), state_of(model)
    adapter = state.get(name)
    if state.folded is not None:
        state.check_unfolded([n for n in state.folded.names if n == name], "it can't be deleted")
    prepared = state.serving is not None
    others = [
        a for a in state.adapters.values() if a is not adapter and (a.name in state.active or a.trained is not None)
    ]
    touched = {} if prepared else hosts(model, [adapter, *(a for a in others if a.name in state.active)])
    with restoring(model, [adapter, *others], touched.values()):
        if name in state.active:
            set_adapter(model, [n for n in state.active if n != name])
        del state.adapters[name]
        state.baked = [n for n in state.baked if n != name]
        if not prepared:
            detach(model, adapter)
            watch_loss(model, state)
        if not state.adapters and not prepared and state.folded is None:
            drop_state(model)


# --- what they share ---


def _set_strengths(adapter: Adapter) -> None:
    for site, part in adapter.parts.items():
        if isinstance(part, SiteAdapter):
            part.set_strength(adapter.strength_at(site))


def _of_sites(adapter: Adapter, scales: Mapping[str, float]) -> dict[str, float]:
    """Site -> scale, of module -> scale."""
    found: dict[str, float] = {}
    unused = dict.fromkeys(scales)
    for site in adapter.values.sites:
        name = site
        while name:
            if name in scales:
                unused.pop(name, None)
                found.setdefault(site, float(scales[name]))  # the innermost comes first
            name = name.rpartition(".")[0]
    if unused:
        raise AdapterError(
            f"set_scale: modules that have no site of adapter {adapter.name!r}:\n{listing(unused)}\nIts sites:\n"
            f"{listing(adapter.values.sites)}"
        )
    return found


@changes
def _set_enabled(model: nn.Module, enabled: bool) -> None:
    model, state = unwrap(model), state_of(model)
    if not enabled and state.folded is not None:
        state.check_unfolded(state.folded.names, "it can't be switched off")
    if state.serving is not None:
        state.serving.activate(model, state, [state.adapters[n] for n in state.active] if enabled else [])
        state.enabled = enabled
    else:
        switch(model, state, state.active, enabled)
