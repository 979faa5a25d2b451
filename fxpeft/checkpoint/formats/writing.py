"""LoRAs of a pipeline's components to one file that image tools read: diffusers' or kohya's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fxpeft.checkpoint.adapter_file import site_scale, site_tensors
from fxpeft.checkpoint.formats.diffusers import METADATA
from fxpeft.checkpoint.formats.kohya import SHORT
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.checkpoint.writing import safetensors_file
from fxpeft.errors import AdapterError, listing
from fxpeft.files import make_folder, replace_files
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig, matching

_KOHYA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


@matching()
def write_components(
    path: Path, components: Mapping[str, Checkpoint], file_format: Literal["diffusers", "kohya"]
) -> None:
    """Write one ``.safetensors`` file, whole.

    Args:
        components: component -> its adapter, as PEFT's files hold it.

    Raises:
        AdapterError: no LoRA, or one that brings what the format has no keys for; nothing was written.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, found in components.items():
        sites = _checked(component, found, file_format)
        if file_format == "kohya":
            tensors |= _kohya(component, found.config, sites)
            continue
        prefix = method_of(found.config).prefix
        before = f"{component}." if component else ""  # of one model alone no key names it
        tensors |= {f"{before}{key.removeprefix(prefix)}": tensor for key, tensor in found.tensors.items()}
        settings = {key: value for key, value in found.config.to_dict().items() if value not in (None, {}, [])}
        metadata |= {f"{before}{key}": value for key, value in settings.items()}
    header = {"format": "pt"} | ({METADATA: json.dumps(metadata, indent=2, sort_keys=True)} if metadata else {})
    make_folder(path.parent)
    replace_files({path: safetensors_file(tensors, header)})


def _checked(component: str, found: Checkpoint, file_format: str) -> dict[str, dict[str, Tensor]]:
    """A LoRA's sites, where the format has keys for all that it brings."""
    if method_of(found.config).name not in ("lora", "dora"):
        raise AdapterError(
            f"{component}: expected a LoRA, which is all that {file_format}'s files hold; found "
            f"{method_of(found.config).name}: fxpeft.convert makes one of it"
        )
    sites, rest = site_tensors(found)
    more = [*rest, *(key for key in found.tensors if file_format == "kohya" and key.endswith(".bias"))]
    if more:
        raise AdapterError(
            f"{component}: {file_format}'s files have no keys for these:\n{listing(dict.fromkeys(more))}"
        )
    return sites


def _kohya(component: str, config: AdapterConfig, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A file has an alpha for each site, and its scale is always alpha / rank."""
    if component not in SHORT:
        raise AdapterError(f"component: expected one of {', '.join(SHORT)}; found {component!r}")
    tensors: dict[str, Tensor] = {}
    for site, own in sites.items():
        name = f"lora_{SHORT[component]}_{site.replace('.', '_')}"
        for part, tensor in own.items():
            if part == "lora_magnitude_vector":
                tensor = tensor.reshape(-1, *[1] * (own["lora_A"].ndim - 1))
            tensors[f"{name}.{_KOHYA[part]}"] = tensor
        rank = len(own["lora_A"])
        tensors[f"{name}.alpha"] = torch.tensor(site_scale(config, site, rank) * rank)
    return tensors
