"""The adapter methods of diffusers' models, backed by fxpeft: parameters and defaults are diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxpeft import adapters, checkpoint
from fxpeft.adapters.change import changes
from fxpeft.adapters.components import save_components
from fxpeft.adapters.state import find_state, state_of
from fxpeft.checkpoint.formats import PipelineFile, read_file
from fxpeft.errors import AdapterError
from fxpeft.integrations.diffusers import pipeline, verbs
from fxpeft.integrations.diffusers.pipeline_methods import WEIGHTS, download
from fxpeft.integrations.diffusers.renaming import alphas_told
from fxpeft.integrations.diffusers.together import together
from fxpeft.integrations.diffusers.weights import of_names
from fxpeft.integrations.transformers.loading import as_config
from fxpeft.transform.folding import unfold


def load_lora_adapter(
    self: nn.Module,
    pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
    prefix: str | None = "transformer",
    hotswap: bool = False,
    **kwargs: Any,
) -> None:
    """Load what a file has for this model, and make it the active adapter; or swap it in.

    Args:
        prefix: what the model is called in the file; ``None``: its keys name none.

    Raises:
        CheckpointError, AdapterError: as :func:`fxpeft.load_adapter`; nothing was changed.
    """
    source, name = pretrained_model_name_or_path_or_dict, kwargs.pop("adapter_name", None)
    kwargs.pop("_pipeline", None)
    alphas = kwargs.pop("network_alphas", None) or {}
    if isinstance(source, Mapping):
        found: Any = read_file({**source, **alphas_told(alphas)}, {}, "the state_dict")
    else:
        found = checkpoint.read(str(source), **download(kwargs))
    if not isinstance(found, PipelineFile):
        raise AdapterError(f"{source}: has PEFT's two files: fxpeft.load_adapter(model, ...)")
    state = find_state(self)
    taken = [] if state is None else list(state.adapters)
    own = pipeline.in_models(found.only(prefix or ""), {prefix or "": self}, {})
    pipeline.enter(found.source, {prefix or "": self}, own, name or f"default_{len(taken)}", hotswap)


def save_lora_adapter(
    self: nn.Module,
    save_directory: str | Path,
    adapter_name: str = "default",
    upcast_before_saving: bool = False,
    safe_serialization: bool = True,
    weight_name: str | None = None,
) -> None:
    """Write an adapter of this model; its keys name no component, as diffusers' do here.

    Raises:
        AdapterError: pickles are asked for, or the adapter is no LoRA; nothing was written.
    """
    if not safe_serialization or upcast_before_saving:
        raise AdapterError("save_lora_adapter: expected safetensors in the adapter's own dtype; cast the model before")
    save_components(Path(save_directory, weight_name or WEIGHTS), {"": self}, adapter_name)


def set_adapters(self: nn.Module, adapter_names: str | Sequence[str], weights: Any = None) -> None:
    """Make these the active adapters, with these weights, by block too."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    state = state_of(self)
    for name in names:
        state.get(name)
    with together([self]):
        pipeline.choose(self, state, dict(zip(names, of_names(weights, names), strict=True)))


def add_adapter(self: nn.Module, adapter_config: Any, adapter_name: str = "default") -> None:
    """Add a fresh adapter for training; its config is fxpeft's or PEFT's."""
    adapters.add_adapter(self, as_config(adapter_config), adapter_name)


def set_adapter(self: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make these adapters, and no others, the active ones."""
    adapters.set_adapter(self, adapter_name)


def disable_adapters(self: nn.Module) -> None:
    """Run the bare model until ``enable_adapters``."""
    adapters.disable_adapters(self)


def enable_adapters(self: nn.Module) -> None:
    """Let the active adapters take part again."""
    adapters.enable_adapters(self)


def active_adapters(self: nn.Module) -> list[str]:
    """The active adapters' names."""
    return adapters.active_adapters(self)


@changes
def fuse_lora(
    self: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
) -> None:
    """Put adapters into the weights."""
    verbs.fuse(self, state_of(self), lora_scale, safe_fusing, adapter_names)


@changes
def unfuse_lora(self: nn.Module) -> None:
    """Take what is fused out of the weights."""
    if state_of(self).folded is not None:
        unfold(self)


def unload_lora(self: nn.Module) -> None:
    """Take all adapters out; what is fused stays in the weights."""
    state = find_state(self)
    if state is not None:
        verbs.unload(self, state)


def disable_lora(self: nn.Module) -> None:
    """Run the bare model until ``enable_lora``."""
    adapters.disable_adapters(self)


def enable_lora(self: nn.Module) -> None:
    """Let the active adapters take part again."""
    adapters.enable_adapters(self)


def delete_adapters(self: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Forget adapters: all of these or none."""
    with together([self]):
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            adapters.delete_adapter(self, name)


def enable_lora_hotswap(self: nn.Module, target_rank: int = 128, check_compiled: str = "error", **options: Any) -> None:
    """Slots at every layer; see :func:`fxpeft.integrations.diffusers.enable_lora_hotswap`."""
    verbs.prepare(self, target_rank, options)


METHODS = (
    load_lora_adapter, save_lora_adapter, set_adapters, add_adapter, set_adapter, disable_adapters, enable_adapters,
    active_adapters, fuse_lora, unfuse_lora, unload_lora, disable_lora, enable_lora, delete_adapters,
    enable_lora_hotswap,
)  # fmt: skip
