"""The fields of a LoRA's config that say how it starts, brought into the form that PEFT keeps them in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from fxpeft.errors import AdapterError
from fxpeft.methods.blocks import BdLoraConfig
from fxpeft.methods.data_starts import NAMES, CordaConfig, LoraGAConfig
from fxpeft.methods.inits import EvaConfig, LoftQConfig

S = TypeVar("S", LoftQConfig, EvaConfig, CordaConfig, LoraGAConfig, BdLoraConfig)
OWN: tuple[tuple[str, type[Any]], ...] = (("eva", EvaConfig), ("corda", CordaConfig), ("lora_ga", LoraGAConfig))


def read_starts(config: Any) -> None:
    """Bring the fields of a start into their form; those of another start have no effect."""
    if isinstance(config.init_lora_weights, str):
        config.init_lora_weights = config.init_lora_weights.lower()
    start: Any = config.init_lora_weights
    given: Any = config.loftq_config or {}
    if not isinstance(given, dict | LoftQConfig):
        raise AdapterError(f"loftq_config: expected a dict or a LoftQConfig, found {given!r}")
    if start == "loftq" and not given:
        raise AdapterError("init_lora_weights='loftq' needs loftq_config, for instance {'loftq_bits': 4}")
    if start == "loftq":
        config.loftq_config = vars(sub_config(LoftQConfig, given, "loftq_config"))
    elif given:
        warnings.warn(f"loftq_config has no effect with init_lora_weights={start!r}", stacklevel=4)
        config.loftq_config = {}
    for name, cls in OWN:
        field, own = f"{name}_config", getattr(config, f"{name}_config")
        if own is not None and start != name:
            warnings.warn(f"{field} has no effect with init_lora_weights={start!r}", stacklevel=4)
        if isinstance(own, dict) or start == name:
            setattr(config, field, sub_config(cls, own or {}, field))


def loaded_start(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """A file's config without a start from data, which no file holds: its factors are added to the base as it is."""
    start = str(values.get("init_lora_weights")).lower()
    kept = {key: value for key, value in values.items() if key not in ("corda_config", "lora_ga_config")}
    if start not in NAMES:
        return kept
    warnings.warn(
        f"{source}: init_lora_weights={start!r} took its start off a base that the file doesn't hold: the adapter is "
        "right on that base alone, as in PEFT. Convert it where it was trained: save_adapter(..., plain=True)",
        stacklevel=3,
    )
    return {**kept, "init_lora_weights": True}


def sub_config(cls: type[S], given: Any, name: str) -> S:
    """A config of a field of its own.

    Raises:
        AdapterError: it is none, or has other fields.
    """
    if isinstance(given, cls):
        return given
    if not isinstance(given, dict):
        raise AdapterError(f"{name}: expected a {cls.__name__} or a dict of its fields, found {given!r}")
    unknown = ", ".join(sorted(map(str, given.keys() - cls.__dataclass_fields__.keys())))
    if unknown:
        known = ", ".join(cls.__dataclass_fields__)
        raise AdapterError(f"{name}: {cls.__name__} has no fields {unknown}; it has {known}")
    return cls(**given)
