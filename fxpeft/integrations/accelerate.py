"""accelerate's FSDP with fxpeft's adapters, where it asks PEFT: how to wrap, and checkpoints of adapters alone.

``install`` sets :func:`replacements`; ``Trainer`` then saves and resumes adapters from shards, FSDP1's and FSDP2's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from accelerate.utils import fsdp_utils
from accelerate.utils.dataclasses import get_module_class_from_name
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from fxpeft.errors import AdapterError, CheckpointError, listing
from fxpeft.integrations.transformers.model_state import adapters_of
from fxpeft.model.wrappers import named_modules, plain_name, unwrap
from fxpeft.passes.live import Container


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The ``auto_wrap_policy`` of FSDP for a model with adapters, as PEFT's function of that name: its layers.

    An adapter goes with the layer that reads its parameters. FSDP1 needs ``use_orig_params=True`` for that, which is
    accelerate's default, and adapters in the base's dtype.

    Raises:
        AdapterError: the environment's ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names no module's class, or neither it nor the
            model says which the layers are.
    """
    model = unwrap(model)
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = sorted(getattr(model, "_no_split_modules", None) or ()) if given is None else given.split(",")
    classes = {name: get_module_class_from_name(model, name) for name in names if name}
    if missing := [name for name, cls in classes.items() if cls is None and given is not None]:
        raise AdapterError(f"FSDP_TRANSFORMER_CLS_TO_WRAP: {', '.join(missing)}: no module of this class in the model")
    layers = {cls for cls in classes.values() if cls is not None}
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} doesn't say which its layers are (_no_split_modules): name their class in the "
            "environment's FSDP_TRANSFORMER_CLS_TO_WRAP"
        )
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)


def replacements() -> Iterator[tuple[ModuleType, str, Any]]:
    """Module, name and value of what has to be set in accelerate."""
    for name, make in {"_get_model_state_dict": _gets, "_set_model_state_dict": _sets}.items():
        if hasattr(fsdp_utils, name):
            yield fsdp_utils, name, make(getattr(fsdp_utils, name))


def _gets(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def get(model: nn.Module, adapter_only: bool = False, sd_options: Any = None) -> Any:
        if not adapter_only or not adapters_of(model):
            return theirs(model, adapter_only=adapter_only, sd_options=sd_options)
        if sd_options is not None:  # FSDP2: the base need not be gathered
            sd_options = replace(sd_options, ignore_frozen_params=True)
        return _of_adapters(model, theirs(model, sd_options=sd_options))

    return get


def _sets(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def put(model: nn.Module, state_dict: dict[str, Any], adapter_only: bool = False, sd_options: Any = None) -> Any:
        if not adapter_only or not adapters_of(model):
            return theirs(model, state_dict, adapter_only=adapter_only, sd_options=sd_options)
        if sd_options is None:
            found = model.load_state_dict(state_dict, strict=False)
        else:
            found = theirs(model, state_dict, sd_options=replace(sd_options, strict=False))
        trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = [name for name in found.missing_keys if plain_name(name) in trained]
        if wrong := [*missing, *found.unexpected_keys]:
            raise CheckpointError(f"no checkpoint of this model's adapters: missing or unexpected:\n{listing(wrong)}")
        return type(found)([], [])

    return put


def _of_adapters(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's ``state_dict`` has of adapters."""
    own = tuple(f"{name}." for name, module in named_modules(model) if isinstance(module, Container))
    return {key: value for key, value in state_dict.items() if plain_name(key).startswith(own)}
