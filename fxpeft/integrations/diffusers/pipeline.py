"""A diffusers pipeline's LoRAs: one file to all components that it is for, all or nothing, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.adapters.api import set_adapter, set_scale
from fxpeft.adapters.change import ordinary
from fxpeft.adapters.components import save_components
from fxpeft.adapters.installing import check_name, install_adapter, replace_attached
from fxpeft.adapters.loading import load
from fxpeft.adapters.state import Adapter, ModelState, find_state, is_prepared, state_of
from fxpeft.adapters.values import placed
from fxpeft.checkpoint.formats import PipelineFile, read_file
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.integrations.diffusers.renaming import renamed
from fxpeft.integrations.diffusers.scales import watch_scales
from fxpeft.integrations.diffusers.together import Pipeline, adapted, check_named, models_of, together
from fxpeft.integrations.diffusers.weights import Weight, of_components, strength
from fxpeft.methods.base import Method
from fxpeft.model.modules import Modules


@ordinary()
def load_lora_weights(
    pipe: Pipeline,
    source: str | Path | Mapping[str, Tensor],
    name: str = "default",
    *,
    hotswap: bool = False,
    into: Mapping[str, str] | None = None,
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
        source: a folder, a hub id, a ``.safetensors`` file, or its tensors. weight_name: which file of several.
        hotswap: replace the adapters of this name; components that have none get one. A component that has one and for
            which the file has none is refused.
        into: component in the file -> in the pipeline, as ``{"transformer": "transformer_2"}`` of Wan.
        revision, subfolder, token, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointError: a file that is missing or doesn't fit; every key that has no place is named.
        AdapterError: an adapter of this name is there already, or, to be replaced, isn't. Nothing was changed in any
            component.
    """
    if isinstance(source, Mapping):
        found: checkpoint.Checkpoint = read_file(dict(source), {}, "the state_dict")
    else:
        found = checkpoint.read(
            source, weight_name=weight_name, revision=revision, subfolder=subfolder, token=token,
            local_files_only=local_files_only,
        )  # fmt: skip
    if not isinstance(found, PipelineFile):
        raise AdapterError(f"{source}: is of one model, no pipeline's: fxpeft.load_adapter(pipe.unet, ...)")
    models = models_of(pipe)
    of_models = placed_parts(pipe, found, models, into or {})
    enter(found.source, models, of_models, name, hotswap)
    if not hotswap:
        watch_scales()


def enter(
    source: str,
    models: Mapping[str, nn.Module],
    of_models: Mapping[str, checkpoint.Checkpoint],
    name: str,
    hotswap: bool,
) -> None:
    """Load or swap the adapter of each model, all or nothing."""
    with together([models[component] for component in of_models]):
        made: dict[str, Adapter] = {}
        for component, own in of_models.items():
            model = models[component]
            if not hotswap:
                check_name(model, name)
            own.config.inference_mode = True
            plan, values = load(Modules(model), own)
            if not (hotswap and is_prepared(model)):  # whose slots get a copy anyway
                values = placed(model, values, autocast=not is_prepared(model))
            made[component] = Adapter(name, plan, values)
        left = [c for c, m in models.items() if c not in made and (s := find_state(m)) and name in s.adapters]
        if hotswap and left:
            raise AdapterError(
                f"{source}: replaces {name!r}, but has nothing for {', '.join(left)}; delete it there first"
            )
        have = {c: s for c in made if (s := find_state(models[c])) is not None and name in s.adapters}
        if hotswap and not have:
            raise AdapterError(f"{source}: no adapter named {name!r} to replace in {', '.join(made)}")
        on = any(name in state.active for state in have.values())
        for component, adapter in made.items():
            model = models[component]
            if component not in have:
                active = [] if (found := find_state(model)) is None else list(found.active)
                install_adapter(model, adapter)
                if hotswap and (active or not on):  # it comes beside what is active there, as it is elsewhere
                    set_adapter(model, [*active, name] if on else active)
                continue
            state = state_of(model)
            adapter.strength = state.get(name).strength
            if state.serving is None:
                replace_attached(model, state, adapter)
            else:
                state.serving.replace(model, state, adapter, owned=False)


def set_adapters(pipe: Pipeline, names: str | Sequence[str], weights: Any = None) -> None:
    """Make these the active adapters of each component that has them, as ``pipe.set_adapters``: all or nothing.

    Args:
        weights: one for all; one for each name; component -> weight; and for a weight of a component block -> weight,
            as ``{"unet": {"down": 0.5, "up": {"block_1": [0.2, 0.3, 0.4]}}, "text_encoder": 1}``, or of a transformer
            ``{"transformer": {"transformer_blocks.0": 0.5}}``. What isn't named has 1, as has ``None``.

    Raises:
        AdapterError: a name that no component has, or weights that don't fit the names or blocks; nothing was changed.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    models = models_of(pipe)
    each = of_components(weights, wanted, list(models))
    states = adapted(models)
    check_named(states, wanted)
    with together([models[component] for component in states]):
        for component, state in states.items():
            choose(models[component], state, dict(zip(wanted, each[component], strict=True)))


def choose(model: nn.Module, state: ModelState, weights: Mapping[str, Weight]) -> None:
    """Make those of the adapters that a model has the active ones, with these weights. Part of a change."""
    here = {name: strength(model, state.adapters[name], w) for name, w in weights.items() if name in state.adapters}
    for name, own in here.items():
        if own != 1 or state.adapters[name].strength != 1:
            set_scale(model, name, own)
    set_adapter(model, list(here))


def save_lora_weights(
    pipe: Pipeline, path: str | Path, name: str = "default", *, file_format: Literal["diffusers", "kohya"] = "diffusers"
) -> None:
    """Write an adapter of all components that have it to one file; see :func:`fxpeft.save_components`."""
    models = models_of(pipe)
    own = {component: models[component] for component, state in adapted(models).items() if name in state.adapters}
    save_components(path, own, name, file_format=file_format)


def placed_parts(
    pipe: Pipeline, found: PipelineFile, models: Mapping[str, nn.Module], into: Mapping[str, str]
) -> dict[str, checkpoint.Checkpoint]:
    """Component -> its adapter under the model's names, which diffusers has to give where the file's are others."""
    try:
        return in_models(found, models, into)
    except CheckpointError:
        if not hasattr(type(pipe), "lora_state_dict"):
            raise
        return in_models(renamed(pipe, found), models, into)


def in_models(
    found: PipelineFile, models: Mapping[str, nn.Module], into: Mapping[str, str]
) -> dict[str, checkpoint.Checkpoint]:
    """Component -> its adapter, of a file whose names are the models'."""
    parts = {part: _model_of(found, part, models, into) for part in found.parts}
    if missing := [component or "(none named)" for component in parts.values() if component not in models]:
        raise CheckpointError(f"{found.source}: the pipeline has no {', '.join(missing)}; it has {', '.join(models)}")
    own: dict[str, checkpoint.Checkpoint] = {}
    for part, component in parts.items():
        modules = Modules(models[component])
        own[component] = found.component(part, modules)
        _check_inputs(found, own[component], modules)
    return own


def _model_of(found: PipelineFile, part: str, models: Mapping[str, nn.Module], into: Mapping[str, str]) -> str:
    """The component that a part is for; of one that names none the only one that has its sites."""
    if part or part in into or len(found.parts) > 1:
        return into.get(part, part)
    fitting = [component for component, model in models.items() if found.fits(part, Modules(model))]
    return fitting[0] if len(fitting) == 1 else part


def _check_inputs(found: PipelineFile, own: checkpoint.Checkpoint, modules: Modules) -> None:
    """Refuse what diffusers loads by giving the model's own layers other shapes, with the reason."""
    for key, tensor in own.tensors.items():
        site = key.removeprefix(Method.prefix).removesuffix(".lora_A.weight")
        module = modules.get(site) if key.endswith(".lora_A.weight") else None
        if isinstance(module, nn.Linear) and tensor.dim() == 2 and tensor.shape[1] > module.in_features:
            raise CheckpointError(
                f"{found.source}: {site}: takes {module.in_features} inputs, and the adapter's A has "
                f"{tensor.shape[1]}: a control LoRA, for which diffusers widens the model's own layer in place and "
                "leaves it so. fxpeft gives no layer of the base another shape: load a model made for control inputs"
            )
