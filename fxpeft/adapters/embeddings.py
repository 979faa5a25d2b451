"""The base's embeddings beside an adapter: as PEFT, where they are targets or the vocabulary was resized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.model.walk import base_modules, base_values, embedding_layer

SaveEmbeddings = bool | Literal["auto"]
NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES: targets whose base weights "auto" saves


def embedding_tensors(model: nn.Module, adapter: Adapter, save: SaveEmbeddings = "auto") -> dict[str, Tensor]:
    """Weights of the input and output embeddings under PEFT's keys; those that the adapter brings itself left out.

    Args:
        save: ``"auto"``: embeddings that are targets, and both where the vocabulary is of another size than that of
            the base model that the config names, which is looked up in folders and in the hub's cache only.

    Raises:
        AdapterError: ``save`` is none of these.
    """
    if not isinstance(save, bool) and save != "auto":
        raise AdapterError(f"save_embedding_layers: expected True, False or 'auto', found {save!r}")
    method = method_of(adapter.config)
    if save is False or not method.targeted:
        return {}
    layers = [embedding_layer(model, side) for side in ("input", "output")]
    names = [name for name, module in base_modules(model) if any(module is layer for layer in layers)]
    if save is True and not names:
        name = type(model).__name__
        warnings.warn(f"save_embedding_layers: {name} doesn't say which its embeddings are", stacklevel=3)
    if save == "auto" and not _resized(model, adapter):
        names = [name for name in names if name in adapter.plan.sites and name.rpartition(".")[2] in NAMES]
    starts_from_base = bool(method.frozen(adapter.config) or adapter.plan.weights)
    found = {}
    for name in names:
        # the weight below an adapter that starts from it, as PiSSA's, is another one in PEFT, who works it out again
        if name in adapter.values.saved or (name in adapter.plan.sites and starts_from_base):
            continue
        place = f"{name}.base_layer" if name in adapter.plan.sites else name
        for leaf, tensor in base_values(model.get_submodule(name)).items():
            if f"{name}.{leaf}" not in adapter.values.tensors:
                found[f"{method.prefix}{place}.{leaf}"] = tensor.detach()
    return found


def _resized(model: nn.Module, adapter: Adapter) -> bool:
    """Whether the base's own config has a vocabulary of another size."""
    config = getattr(model, "config", None)
    size, base = getattr(config, "vocab_size", None), adapter.config.base_model_name_or_path
    base = base or getattr(model, "name_or_path", None)
    if not size or not base:
        return False
    path: object = Path(base, "config.json")
    if not Path(base, "config.json").is_file():
        try:
            path = try_to_load_from_cache(base, "config.json", revision=getattr(adapter.config, "revision", None))
        except ValueError:  # no id of the hub
            return False
    if not isinstance(path, str | Path):
        return False
    try:
        return bool(type(config).from_pretrained(str(Path(path).parent)).vocab_size != size)  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return False
