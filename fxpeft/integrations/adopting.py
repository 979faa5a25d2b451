"""A model with PEFT's layers in; the same model with fxpeft's adapters out, of the same names and values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any

from torch import nn

from fxpeft.adapters.api import disable_adapters, set_adapter
from fxpeft.adapters.installing import install_adapter
from fxpeft.adapters.loading import load
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.parameters import set_requires_grad
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter
from fxpeft.adapters.values import placed
from fxpeft.checkpoint import Checkpoint
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import config_class
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.modules import Modules, of_peft
from fxpeft.model.wrappers import unwrap

_LOADED = "_hf_peft_config_loaded"  # Transformers' and diffusers' note that PEFT's layers are there


def adopt(model: nn.Module) -> nn.Module:
    """Take PEFT's adapters over: its layers go, and fxpeft has the adapters under their names, active as they were.

    For a model that ``peft.get_peft_model``, ``PeftModel.from_pretrained``, or ``add_adapter`` and ``load_adapter`` of
    Transformers or diffusers made. The base's weights are those in memory, so a start that changed them (PiSSA,
    OLoRA) stays as it is there.

    Args:
        model: PEFT's model, or one that has its layers. It can't be used afterwards where it is PEFT's.

    Returns:
        The base model, the same object, with fxpeft's adapters.

    Raises:
        AdapterError: no layer of PEFT's, an adapter that is merged, or one that fxpeft can't hold; nothing was changed.
    """
    whole: Any = unwrap(model)
    peft: Any = sys.modules.get("peft")
    base: nn.Module = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    layers = [(name, module) for name, module in base.named_modules() if of_peft(module) and _inner(module) is not None]
    configs: dict[str, Any] = dict(getattr(whole, "peft_config", None) or {})
    if peft is None or not configs or not (layers or of_peft(whole)):
        raise AdapterError(f"expected a model with PEFT's adapters, found {type(whole).__name__} without")
    if merged := [name for name, module in layers if getattr(module, "merged", False)]:
        raise AdapterError(f"PEFT has merged adapters here; call its unmerge_adapter first:\n{listing(merged)}")
    found = {name: _read(peft, whole, name, config) for name, config in configs.items()}
    first: Any = layers[0][1] if layers else whole  # Transformers' own answer asks for a PEFT of its choice
    active = list(first.active_adapters)
    off = any(getattr(module, "disable_adapters", False) for _, module in layers)
    trained = {name for name in configs if any(p.requires_grad for p in _parameters(layers, name))}
    notes = {key: vars(base)[key] for key in ("peft_config", _LOADED) if key in vars(base)}
    with restoring(base, []):  # puts PEFT's layers back too: they are children of the modules around them
        for name, module in reversed(layers):
            owner, _, leaf = name.rpartition(".")
            base.get_submodule(owner)._modules[leaf] = _inner(module)
        for key in notes:
            delattr(base, key)
        for name, own in found.items():
            modules = Modules(base)
            plan, values = load(modules, own)
            install_adapter(base, Adapter(name, plan, placed(base, values, autocast=False)), modules)
        set_adapter(base, [name for name in active if name in found])
        for name in active:
            set_requires_grad(base, name, name in trained)
        if off:
            disable_adapters(base)
    return base


def _read(peft: Any, model: Any, name: str, config: Any) -> Checkpoint:
    """An adapter as a file of PEFT's would hold it, relative to the base in memory."""
    check_adapter_name(name)
    source = f"PEFT's adapter {name!r}"
    values = {
        k: v.value if isinstance(v, Enum) else list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()
    }
    own = config_class(values["peft_type"], source).from_dict(values, source=source, loading=True)
    if isinstance(own, LoraConfig):
        own.init_lora_weights = True
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return Checkpoint(source, own, {key: tensor.detach().clone() for key, tensor in tensors.items()})


def _inner(module: nn.Module) -> nn.Module | None:
    """What PEFT's layer stands around."""
    own = module._modules
    inner = own.get("base_layer") or own.get("original_module") or own.get("token_adapter")
    while inner is not None and of_peft(inner) and (deeper := _inner(inner)) is not None:
        inner = deeper
    return inner


def _parameters(layers: list[tuple[str, nn.Module]], name: str) -> Iterator[nn.Parameter]:
    for _, module in layers:
        for key, parameter in module.named_parameters():
            if name in key.split(".") and "base_layer" not in key:
                yield parameter
