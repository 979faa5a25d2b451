"""The base's embeddings beside an adapter: as PEFT, where they are targets or the vocabulary was resized."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from fxpeft.adapters.agreement import holders
from fxpeft.adapters.gathering import gather, parted
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.model.placement import ZERO
from fxpeft.model.walk import base_modules, base_state, base_values, embedding_layer
from fxpeft.model.wrappers import plain_name, submodule, unwrap
from fxpeft.passes.base import attribute, join
from fxpeft.passes.torch_private import FSDP

SaveEmbeddings = bool | Literal["auto"]
NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES: targets whose base weights "auto" saves


def embedding_tensors(
    model: nn.Module,
    adapter: Adapter,
    save: SaveEmbeddings = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Weights of the input and output embeddings under PEFT's keys; those that the adapter brings itself left out.

    Args:
        model: as the caller has it; shards are gathered, by all processes.
        save: ``"auto"``: embeddings that are targets, and both where the vocabulary is of another size than that of
            the base model that the config names, which is looked up in folders and in the hub's cache only.
        state_dict: the whole model's, gathered before: weights that are in parts are taken from it, and no other
            process has to be here.

    Raises:
        AdapterError: ``save`` is none of these, a weight is not whole here, or ``state_dict`` lacks it.
    """
    outer, model = model, unwrap(model)
    if not isinstance(save, bool) and save != "auto":
        raise AdapterError(f"save_embedding_layers: expected True, False or 'auto', found {save!r}")
    method = method_of(adapter.config)
    if save is False or method.feeds:
        return {}
    layers = [embedding_layer(model, side) for side in ("input", "output")]
    layers = [unwrap(layer) for layer in layers if layer is not None]
    names = [name for name, module in base_modules(model) if any(module is layer for layer in layers)]
    if save is True and not names:
        name = type(model).__name__
        warnings.warn(f"save_embedding_layers: {name} doesn't say which its embeddings are", stacklevel=3)
    if save == "auto" and not _resized(model, adapter):
        if adapter.plan.tokens:  # a file with rows needs no whole embeddings
            return {}
        names = [name for name in names if name in adapter.plan.sites and name.rpartition(".")[2] in NAMES]
    starts_from_base = bool(method.frozen(adapter.config) or adapter.plan.weights)
    places: dict[str, tuple[str, str]] = {}
    for name in names:
        # the weight below an adapter that starts from it, as PiSSA's, is another one in PEFT, who works it out again
        if name in adapter.values.saved or (name in adapter.plan.sites and starts_from_base):
            continue
        place = f"{name}.base_layer" if name in adapter.plan.sites else name
        if name in adapter.plan.tokens:
            place = join(name, method.tokens_key.removesuffix("trainable_tokens_delta") + "base_layer")
        for leaf in base_state(submodule(model, name)):
            if f"{name}.{leaf}" not in adapter.values.tensors:
                places[f"{method.prefix}{place}.{leaf}"] = name, leaf
    if state_dict is None or not holders(outer):
        return _whole(outer, places)
    held = {plain_name(key): value for key, value in state_dict.items()}
    if missing := [path for name, leaf in places.values() if (path := f"{name}.{leaf}") not in held]:
        raise AdapterError(
            f"the base's embeddings are saved with this adapter, and state_dict lacks\n{listing(missing)}\npass the "
            "whole model's, or call save_adapter on every process, without a state_dict"
        )
    return {key: held[f"{name}.{leaf}"].detach() for key, (name, leaf) in places.items()}


def _whole(model: nn.Module, places: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Key -> the base's tensor at a module's place, gathered where it is parted."""
    modules = {name: submodule(model, name) for name, _ in places.values()}

    def read() -> dict[str, Tensor]:
        values = {name: base_values(module) for name, module in modules.items()}
        return {key: values[name][leaf].detach() for key, (name, leaf) in places.items()}

    shapes = {key: _shape(modules[name], leaf) for key, (name, leaf) in places.items()}
    found = read()
    if not parted(found, shapes):
        return found
    own = (parameter for module in modules.values() for parameter in module.parameters(recurse=False))
    found = gather(model, read, found, shapes, own)
    if cut := [f"{key}: found {list(found[key].shape)}" for key in parted(found, shapes)]:
        raise AdapterError(
            f"the base's embeddings are not whole here:\n{listing(cut)}\ncall this on every process, with the model as "
            "FSDP or DeepSpeed wrapped it, or with save_embedding_layers=False"
        )
    return found


def _shape(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """The shape of a whole weight or bias: by what its module says where others keep parts of it, else as it is."""
    tensor: Tensor = attribute(module, leaf)
    sizes = {
        "weight": (("num_embeddings", "embedding_dim"), ("out_features", "in_features")), "bias": (("out_features",),)
    }  # fmt: skip
    if hasattr(tensor, ZERO) or FSDP in vars(module):
        for names in sizes.get(leaf, ()):
            if all(isinstance(getattr(module, name, None), int) for name in names):
                return tuple(int(getattr(module, name)) for name in names)
    return tuple(tensor.shape)


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
