"""What a pipeline does with its adapters beside loading them: delete, fuse, switch off, prepare for swaps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from fxpeft.adapters.api import delete_adapter, disable_adapters, enable_adapters, set_scale
from fxpeft.adapters.state import ModelState, find_state, is_prepared, state_of
from fxpeft.integrations.diffusers.together import Pipeline, adapted, check_named, models_of, together
from fxpeft.model.wrappers import unwrap
from fxpeft.serving.prepare import prepare_hotswap
from fxpeft.serving.release import remove
from fxpeft.transform.folding import fold, merge_and_unload, refold, unfold

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what adapters of image models change
#: what a file of an image tool may hold, where a swap is prepared for all of them
METHODS = ("lora", "lora_bias", "dora", "loha", "lokr")


def delete_adapters(pipe: Pipeline, names: str | Sequence[str]) -> None:
    """Forget adapters in all components that have them: all or nothing.

    Raises:
        AdapterError: a name that no component has, or one that is fused; nothing was changed.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    models = models_of(pipe)
    states = adapted(models)
    check_named(states, wanted)
    with together([models[component] for component in states]):
        for component, state in states.items():
            for name in wanted:
                if name in state.adapters:
                    delete_adapter(models[component], name)


def disable_lora(pipe: Pipeline) -> None:
    """Run the bare models until :func:`enable_lora`."""
    _each(pipe, disable_adapters)


def enable_lora(pipe: Pipeline) -> None:
    """Let the active adapters of all components take part again."""
    _each(pipe, enable_adapters)


def fuse_lora(
    pipe: Pipeline,
    components: Collection[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> None:
    """Put adapters into the weights of these components, by default of all: all or nothing.

    Args:
        lora_scale: times the weights that the adapters have; they keep it, as in diffusers.
        safe_fusing: refuse NaN and infinity. adapter_names: which; the active ones by default.

    Raises:
        AdapterError: as :func:`fxpeft.fold`; nothing was changed.
    """
    models = models_of(pipe)
    states = adapted({c: m for c, m in models.items() if components is None or c in components})
    with together([models[component] for component in states]):
        undone: list[tuple[nn.Module, list[str]]] = []
        try:
            for component, state in states.items():
                inside = state.in_weights()
                undone.append((models[component], inside))
                fuse(models[component], state, lora_scale, safe_fusing, adapter_names)
        except BaseException:
            for model, inside in undone:
                _refuse_again(model, inside)
            raise


def fuse(model: nn.Module, state: ModelState, scale: float, safe: bool, names: Sequence[str] | None) -> None:
    """Put adapters into a model's weights, beside those that are there."""
    inside = state.in_weights()
    wanted = [n for n in (state.active if names is None else names) if n in state.adapters and n not in inside]
    if not wanted:
        return
    if scale != 1:
        for name in wanted:
            set_scale(model, name, state.get(name).stronger(scale))
    if inside:
        refold(model, [*inside, *wanted], safe=safe)
    else:
        fold(model, wanted, safe=safe)


def _refuse_again(model: nn.Module, inside: list[str]) -> None:
    """Have those in the weights that were."""
    state = find_state(model)
    if state is not None and state.in_weights() != inside:
        if inside:
            refold(model, inside)
        else:
            unfold(model)


def unfuse_lora(pipe: Pipeline, components: Collection[str] | None = None) -> None:
    """Take what is fused out of the weights of these components, by default of all, bit for bit."""
    models = models_of(pipe)
    for component, state in adapted({c: m for c, m in models.items() if components is None or c in components}).items():
        if state.folded is not None:
            unfold(models[component])


def unload_lora_weights(pipe: Pipeline) -> None:
    """Take all adapters out of all components. What is fused stays in the weights, as in diffusers.

    Slots stay where a component was prepared: the graph that was compiled goes on serving the bare model.
    """
    models = models_of(pipe)
    states = adapted(models)
    with together([models[component] for component in states]):
        for component, state in states.items():
            unload(models[component], state)


def unload(model: nn.Module, state: ModelState) -> None:
    """Take a model's adapters out; slots stay, and what is fused."""
    if state.in_weights():
        merge_and_unload(model, [])
    elif is_prepared(model):
        for name in list(state.adapters):
            delete_adapter(model, name)
    else:
        remove(model)


def enable_lora_hotswap(pipe: Pipeline, target_rank: int = 128, check_compiled: str = "error", **options: Any) -> None:
    """Give every linear layer and convolution of the components that take LoRAs a slot: all or nothing.

    Call it before compiling. Each file that ``load_lora_weights(..., hotswap=True)`` brings then goes in without
    recompiling, whatever its targets, ranks up to ``target_rank``, alphas, and whether it is a DoRA.

    Args:
        target_rank: the most ranks of a site. check_compiled: accepted; slots are there before an adapter is.
        options: of :func:`fxpeft.prepare_hotswap`. ``methods=("lora",)`` is less work where no DoRA comes, and
            ``targets`` say less memory; ``lokr_factor`` gives LoKrs a place of their own, which by default take ranks.

    Raises:
        AdapterError: as :func:`fxpeft.prepare_hotswap`; no component was changed.
    """
    names = getattr(pipe, "_lora_loadable_modules", None)
    models = {c: m for c, m in models_of(pipe).items() if names is None or c in names}
    with together(list(models.values())):
        for model in models.values():
            prepare(model, target_rank, options)


def prepare(model: nn.Module, rank: int, options: dict[str, Any]) -> None:
    """Slots at every layer that an image tool's file may change."""
    bare = unwrap(model)
    targets = [name for name, module in bare.named_modules() if isinstance(module, LAYERS)]
    # a LoKr's place costs every call something: where methods aren't chosen it is asked for
    usual = {} if "methods" in options else {"methods": METHODS, "lokr_factor": 0}
    prepare_hotswap(model, **{"max_rank": rank, "targets": targets, **usual, **options})


def active_names(pipe: Pipeline) -> list[str]:
    """The active adapters, of the component that names most."""
    models = models_of(pipe)
    found = [list(state_of(models[component]).active) for component in adapted(models)]
    return max(found, key=lambda names: len(names), default=[])


def names_by_component(pipe: Pipeline) -> dict[str, list[str]]:
    """Component -> the adapters that it has."""
    return {component: list(state.adapters) for component, state in adapted(models_of(pipe)).items() if state.adapters}


def _each(pipe: Pipeline, change: Any) -> None:
    models = models_of(pipe)
    own = [models[component] for component in adapted(models)]
    with together(own):
        for model in own:
            change(model)
