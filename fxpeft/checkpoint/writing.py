"""An adapter to PEFT's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fxpeft.checkpoint.reading import CONFIG, STAMP, WEIGHTS, stamp
from fxpeft.files import make_folder, replace_files
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.fingerprint import KEY, fingerprint
from fxpeft.targets.sites import AdapterPlan


def to_tensors(plan: AdapterPlan, values: Values) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys; the same memory."""
    method = method_of(plan.config)
    tensors: dict[str, Tensor] = {}
    for site, parameters in values.sites.items():
        stored = method.stored(plan.config, site, plan.sites[site], parameters)
        tensors.update({method.key(site, plan.sites[site], name): value for name, value in stored.items()})
    tensors.update(method.stored_shared(plan.config, values.shared))
    for path, parts in values.saved.items():
        tensors.update({method.prefix + method.saved_key(plan.config, path, k): v for k, v in parts.items()})
    for name, rows in values.tokens.items():
        tensors[f"{method.prefix}{name}.{method.tokens_key}"] = rows
    around = method.tokens_key.removesuffix("trainable_tokens_delta")
    for path, tensor in values.tensors.items():
        if path in plan.weights:
            continue
        owner, _, leaf = path.rpartition(".")
        # PEFT wraps a site's module, which moves the base's own parameters one level down, or two
        wrapped = f"{owner}.base_layer.{leaf}" if owner in values.sites else path
        tensors[method.prefix + (f"{owner}.{around}base_layer.{leaf}" if owner in plan.tokens else wrapped)] = tensor
    return tensors


def write(folder: str | Path, model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files, see :func:`write_files`; what the config leaves open the model says."""
    values = config.changed(inference_mode=True).to_dict()
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if values["task_type"] is None and values["auto_mapping"] is None:
        cls = next(c for c in type(model).__mro__ if not hasattr(c, "_fxpeft_base"))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    write_files(folder, values, tensors, base=fingerprint(model))


def write_files(
    folder: str | Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], *, base: str | None = None
) -> None:
    """Write ``adapter_config.json`` from ``values``, and the tensors; see :func:`~fxpeft.files.replacing`.

    The tensors' file, which is replaced first, notes which config it was saved with.

    Args:
        base: the base's fingerprint, noted there too.
    """
    folder = Path(folder)
    make_folder(folder)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", STAMP: stamp(json.loads(text)), **({KEY: base} if base else {})}
    replace_files({folder / WEIGHTS: safetensors_file(tensors, metadata), folder / CONFIG: text.encode()})


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file's content, its metadata in order: safetensors writes them in any, and equal adapters are equal files."""
    # tied modules may share memory, safetensors can't
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    data = save_tensors(stored, metadata=dict(metadata))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return data[:8] + text + data[8 + size :] if len(text) == size else data
