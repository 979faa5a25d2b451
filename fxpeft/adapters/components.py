"""The adapters of a pipeline's components to one file that image tools read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from fxpeft.adapters.agreement import written
from fxpeft.adapters.gathering import whole_adapter
from fxpeft.adapters.saving import adapter_files
from fxpeft.adapters.state import state_of
from fxpeft.checkpoint import Checkpoint
from fxpeft.checkpoint.formats.writing import write_components
from fxpeft.errors import AdapterError


def save_components(
    path: str | Path,
    components: Mapping[str, nn.Module],
    name: str | None = None,
    *,
    file_format: Literal["diffusers", "kohya"] = "diffusers",
) -> None:
    """Write the LoRAs of several models to one ``.safetensors`` file, as diffusers or kohya's tools read it.

    Args:
        path: the file; its folder is made where missing.
        components: what the format calls each model, ``"unet"``, ``"transformer"``, ``"text_encoder"``, ...: the model.
        name: which adapter; each model's active one by default.
        file_format: ``"diffusers"``: factors, and each config in the file's header; ``"kohya"``: flat names, and an
            alpha for each site.

    Raises:
        AdapterError: an adapter that is no LoRA, or brings what the format has no keys for; nothing was written.
    """
    if not components:
        raise AdapterError("components: expected a name and a model for each, found none")
    found: dict[str, Checkpoint] = {}
    gathered = False
    for component, model in components.items():
        adapter = state_of(model).chosen(name)
        whole = whole_adapter(model, adapter)
        gathered |= whole is not adapter
        plain = True if whole.config.peft_type == "LORA" else None  # what isn't is refused below
        config, tensors = adapter_files(model, whole, plain=plain, save_embedding_layers=False)
        found[component] = Checkpoint(f"{component}'s adapter", config, tensors)
    with written(together=gathered) as here:
        if here:
            write_components(Path(path), found, file_format)
