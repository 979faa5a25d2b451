"""A diffusers pipeline's LoRAs: one file to all components that it is for, all or nothing, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from fxpeft import checkpoint
from fxpeft.adapters.api import set_adapter, set_scale
from fxpeft.adapters.change import changing, ordinary
from fxpeft.adapters.components import save_components
from fxpeft.adapters.installing import check_name, install_adapter
from fxpeft.adapters.loading import load
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter, find_state, is_prepared, state_of
from fxpeft.adapters.values import placed
from fxpeft.checkpoint.formats import PipelineFile, read_file
from fxpeft.checkpoint.formats.diffusers import alpha_key
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.model.modules import Modules
from fxpeft.serving.swap import serving_of


class Pipeline(Protocol):
    """What a diffusers pipeline has: its components by name; its class reads its files."""

    @property
    def components(self) -> dict[str, Any]:
        """Models, tokenizers and schedulers by name."""
        ...


@ordinary()
def load_lora_weights(
    pipe: Pipeline,
    source: str | Path,
    name: str = "default",
    *,
    hotswap: bool = False,
    weight_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> None:
    """Load a file's LoRAs into the components that they are of, and make them the active ones.

    What :func:`fxpeft.load_adapter` reads; and files with another tool's names (sgm, BFL, xlabs, musubi, ...), which
    diffusers' own ``lora_state_dict`` of the pipeline's class renames.

    Args:
        source: a folder, a hub id or a ``.safetensors`` file. weight_name: which file of several.
        hotswap: replace the adapters of this name; a component that has one and for which the file has none is refused.
        revision, subfolder, token, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointError: a file that is missing or doesn't fit; every key that has no place is named.
        AdapterError: an adapter of this name is there already, or, to be replaced, isn't. Nothing was changed in any
            component.
    """
    found = checkpoint.read(
        source, weight_name=weight_name, revision=revision, subfolder=subfolder, token=token,
        local_files_only=local_files_only,
    )  # fmt: skip
    if not isinstance(found, PipelineFile):
        raise AdapterError(f"{source}: is of one model, no pipeline's: fxpeft.load_adapter(pipe.unet, ...)")
    models = _models(pipe)
    of_models = _placed(pipe, found, models)
    with ExitStack() as stack:
        made: dict[str, Adapter] = {}
        for component, own in of_models.items():
            model = models[component]
            if not hotswap:
                check_name(model, name)
            stack.enter_context(changing(model))
            live = not is_prepared(model)
            if live:
                state = find_state(model)
                stack.enter_context(restoring(model, [] if state is None else state.adapters.values()))
            own.config.inference_mode = True
            plan, values = load(Modules(model), own)
            made[component] = Adapter(name, plan, placed(model, values, autocast=live))
        left = [c for c, m in models.items() if c not in made and (s := find_state(m)) and name in s.adapters]
        if hotswap and left:
            raise AdapterError(
                f"{source}: replaces {name!r}, but has nothing for {', '.join(left)}; delete it there first"
            )
        for component, adapter in made.items():
            model = models[component]
            if hotswap:
                state = state_of(model)
                adapter.strength = state.get(name).strength
                serving_of(state).replace(model, state, adapter, owned=False)
            else:
                install_adapter(model, adapter)


def set_adapters(
    pipe: Pipeline,
    names: str | Sequence[str],
    weights: float | Sequence[float] | Mapping[str, float] | None = None,
) -> None:
    """Make these the active adapters of each component that has them, as ``pipe.set_adapters``: all or nothing.

    Args:
        weights: one for all, one for each name, or component -> weight; ``None``: 1.

    Raises:
        AdapterError: a name that no component has, or weights that don't fit the names; nothing was changed.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    models = _models(pipe)
    if isinstance(weights, Mapping):
        if unknown := sorted(set(weights) - set(models)):
            raise AdapterError(f"weights: expected components, {', '.join(models)}; found {', '.join(unknown)}")
        each = {c: [float(weights.get(c, 1.0))] * len(wanted) for c in models}
    else:
        scales = (
            [1.0 if weights is None else weights] * len(wanted) if not isinstance(weights, Sequence) else list(weights)
        )
        if len(scales) != len(wanted):
            raise AdapterError(f"weights: expected one for each of {len(wanted)} adapters, found {len(scales)}")
        each = dict.fromkeys(models, scales)
    states = {component: state for component, model in models.items() if (state := find_state(model)) is not None}
    if missing := [n for n in wanted if not any(n in state.adapters for state in states.values())]:
        raise AdapterError(f"no component has an adapter named {', '.join(missing)}")
    with ExitStack() as stack:
        for component, state in states.items():
            stack.enter_context(changing(models[component]))
            if state.serving is None:
                stack.enter_context(restoring(models[component], state.adapters.values()))
        before = [(models[c], a) for c, state in states.items() for n in wanted if (a := state.adapters.get(n))]
        strengths = [(model, adapter.name, adapter.strength) for model, adapter in before]
        try:
            for component, state in states.items():
                here = [(n, scale) for n, scale in zip(wanted, each[component], strict=True) if n in state.adapters]
                for n, scale in here:
                    set_scale(models[component], n, scale)
                set_adapter(models[component], [n for n, _ in here])
        except BaseException:
            for model, n, strength in strengths:  # a scale is a tensor's value, which the blocks around don't put back
                set_scale(model, n, strength)
            raise


def save_lora_weights(
    pipe: Pipeline, path: str | Path, name: str = "default", *, file_format: Literal["diffusers", "kohya"] = "diffusers"
) -> None:
    """Write an adapter of all components that have it to one file; see :func:`fxpeft.save_components`."""
    own = {c: m for c, m in _models(pipe).items() if (state := find_state(m)) is not None and name in state.adapters}
    save_components(path, own, name, file_format=file_format)


def _models(pipe: Pipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _placed(pipe: Pipeline, found: PipelineFile, models: Mapping[str, nn.Module]) -> dict[str, checkpoint.Checkpoint]:
    """Component -> its adapter under the model's names, which diffusers has to give where the file's are others."""
    try:
        return _in_models(found, models)
    except CheckpointError:
        if not hasattr(type(pipe), "lora_state_dict"):
            raise
        return _in_models(_renamed(pipe, found), models)


def _in_models(found: PipelineFile, models: Mapping[str, nn.Module]) -> dict[str, checkpoint.Checkpoint]:
    if missing := [component or "(none named)" for component in found.parts if component not in models]:
        raise CheckpointError(f"{found.source}: the pipeline has no {', '.join(missing)}; it has {', '.join(models)}")
    return {component: found.component(component, Modules(models[component])) for component in found.parts}


def _renamed(pipe: Pipeline, found: PipelineFile) -> PipelineFile:
    """The file as the pipeline's class reads it."""
    reader: Any = type(pipe)
    given = {"unet_config": pipe.components["unet"].config} if "unet" in pipe.components else {}
    try:
        answer = reader.lora_state_dict(dict(found.written), return_alphas=True, **given)
    except Exception as error:  # whatever its converters raise for keys that they don't know
        raise CheckpointError(f"{found.source}: {reader.__name__} can't read its keys: {error}") from error
    tensors, alphas = answer if isinstance(answer, tuple) else (answer, None)
    told = {alpha_key(key): torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()}
    return read_file({**tensors, **told}, {}, found.source)


__all__ = ["load_lora_weights", "save_lora_weights", "set_adapters"]
