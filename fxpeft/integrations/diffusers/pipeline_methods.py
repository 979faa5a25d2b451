"""The methods of diffusers' pipelines for LoRAs, backed by fxpeft: parameters and defaults are diffusers'."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.integrations.diffusers import pipeline, verbs
from fxpeft.integrations.diffusers.together import Pipeline, adapted, models_of

WEIGHTS = "pytorch_lora_weights.safetensors"
ACCEPTED = ("low_cpu_mem_usage", "use_safetensors", "force_download")  # they change nothing of what is loaded
DOWNLOAD = ("weight_name", "revision", "subfolder", "token", "local_files_only")


def load_lora_weights(
    self: Pipeline,
    pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
    adapter_name: str | None = None,
    hotswap: bool = False,
    **kwargs: Any,
) -> None:
    """Load a file's LoRAs into the components that they are of, and make them the active ones: all or nothing.

    Args:
        adapter_name: ``default_0``, ``default_1``, ... where it is not given.
        hotswap: replace the adapters of that name; nothing recompiles after ``enable_lora_hotswap``.

    Raises:
        CheckpointError, AdapterError: as :func:`fxpeft.integrations.diffusers.load_lora_weights`; nothing was changed.
        TypeError: an argument that fxpeft doesn't know.
    """
    given = download(kwargs)
    second = given.pop("load_into_transformer_2", False)
    pipeline.load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name or _free_name(self), hotswap=hotswap,
        into={"transformer": "transformer_2"} if second else None, **given,
    )  # fmt: skip


def download(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of diffusers' arguments that say where a file is.

    Raises:
        TypeError: one that fxpeft doesn't know and that says something.
    """
    known = (*DOWNLOAD, "load_into_transformer_2")
    unknown = [k for k, v in kwargs.items() if k not in (*known, *ACCEPTED) and v is not None]
    if unknown:
        raise TypeError(f"load_lora_weights: fxpeft takes {', '.join(known)}; found {', '.join(unknown)}")
    return {key: value for key, value in kwargs.items() if key in known and value is not None}


def set_adapters(self: Pipeline, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
    """Make these the active adapters, with these weights; see :func:`fxpeft.integrations.diffusers.set_adapters`.

    Components that the pipeline hasn't got are left out with a warning, as in diffusers.
    """
    if isinstance(adapter_weights, Mapping):
        unknown = [key for key in adapter_weights if key not in models_of(self)]
        if unknown:
            warnings.warn(
                f"adapter_weights: the pipeline has no {', '.join(unknown)}, which are left out", stacklevel=2
            )
        adapter_weights = {key: value for key, value in adapter_weights.items() if key not in unknown}
    pipeline.set_adapters(self, adapter_names, adapter_weights)


def fuse_lora(
    self: Any,
    components: Sequence[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> None:
    """Put adapters into the weights of these components; see :func:`fxpeft.integrations.diffusers.fuse_lora`."""
    _check_components(self, components)
    verbs.fuse_lora(self, components, lora_scale, safe_fusing, adapter_names)
    _note_fused(self)


def unfuse_lora(self: Any, components: Sequence[str] | None = None, **kwargs: Any) -> None:
    """Take what is fused out of the weights of these components."""
    _check_components(self, components)
    verbs.unfuse_lora(self, components)
    _note_fused(self)


def unload_lora_weights(self: Any) -> None:
    """Take all adapters out; what is fused stays in the weights, and the slots where they are."""
    verbs.unload_lora_weights(self)


def disable_lora(self: Pipeline) -> None:
    """Run the bare models until ``enable_lora``."""
    verbs.disable_lora(self)


def enable_lora(self: Pipeline) -> None:
    """Let the active adapters take part again."""
    verbs.enable_lora(self)


def delete_adapters(self: Pipeline, adapter_names: str | Sequence[str]) -> None:
    """Forget adapters in all components that have them."""
    verbs.delete_adapters(self, adapter_names)


def get_active_adapters(self: Pipeline) -> list[str]:
    """The active adapters' names."""
    return verbs.active_names(self)


def get_list_adapters(self: Pipeline) -> dict[str, list[str]]:
    """Component -> names of the adapters that it has."""
    return verbs.names_by_component(self)


def set_lora_device(self: Pipeline, adapter_names: Sequence[str], device: Any) -> None:
    """Refused: adapters that are not active are on the CPU in prepared models, and else move with their model."""
    raise AdapterError(
        "set_lora_device: fxpeft moves adapters with their model; after enable_lora_hotswap those that are not active "
        "wait in the host's memory by themselves"
    )


def enable_lora_hotswap(self: Pipeline, target_rank: int = 128, check_compiled: str = "error", **options: Any) -> None:
    """Slots at every layer; see :func:`fxpeft.integrations.diffusers.enable_lora_hotswap`."""
    verbs.enable_lora_hotswap(self, target_rank, check_compiled, **options)


class SaveLoraWeights:
    """``save_lora_weights``: diffusers' own where it is given tensors, else what the pipeline's adapters are."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __get__(self, pipe: Any, cls: type | None = None) -> Any:
        theirs = self.theirs.__get__(pipe, cls)
        if pipe is None:
            return theirs
        names = [name for name in inspect.signature(theirs).parameters if name.endswith("_layers")]

        def save_lora_weights(
            save_directory: str | Path, *args: Any, adapter_name: str | None = None,
            file_format: Literal["diffusers", "kohya"] = "diffusers", **kwargs: Any,
        ) -> None:  # fmt: skip
            """Write an adapter of all components that have it; or the tensors that are given, as diffusers does.

            Args:
                adapter_name: the active one by default.
            """
            if args or any(kwargs.get(name) is not None for name in names) or not adapted(models_of(pipe)):
                theirs(save_directory, *args, **kwargs)
                return
            path = Path(save_directory, kwargs.get("weight_name") or WEIGHTS)
            pipeline.save_lora_weights(
                pipe, path, adapter_name or _only(verbs.active_names(pipe)), file_format=file_format
            )

        return save_lora_weights


def _only(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise AdapterError(f"save_lora_weights: {len(names)} adapters are active; say which: adapter_name=")
    return names[0]


def _free_name(pipe: Pipeline) -> str:
    """diffusers' name of the next adapter."""
    taken = {name for state in adapted(models_of(pipe)).values() for name in state.adapters}
    number = len(taken)
    while f"default_{number}" in taken:
        number += 1
    return f"default_{number}"


def _check_components(pipe: Any, components: Sequence[str] | None) -> None:
    if not components:
        raise ValueError("`components` cannot be an empty list.")
    for component in components:
        if component not in pipe._lora_loadable_modules:
            raise ValueError(f"{component} is not found in {pipe._lora_loadable_modules=}.")


def _note_fused(pipe: Any) -> None:
    pipe._merged_adapters = {name for state in adapted(models_of(pipe)).values() for name in state.in_weights()}


METHODS = (
    set_adapters, fuse_lora, unfuse_lora, unload_lora_weights, disable_lora, enable_lora, delete_adapters,
    get_active_adapters, get_list_adapters, set_lora_device, enable_lora_hotswap,
)  # fmt: skip
