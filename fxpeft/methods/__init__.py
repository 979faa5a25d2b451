"""The methods. A new one is a file beside these and a line in ``METHODS``."""

from __future__ import annotations

from typing import Any

from fxpeft.config import AdapterConfig
from fxpeft.errors import AdapterError
from fxpeft.methods.base import Method
from fxpeft.methods.lora import Lora
from fxpeft.methods.p_tuning import PTuning
from fxpeft.methods.prefix_tuning import PrefixTuning
from fxpeft.methods.prompt_tuning import PromptTuning

METHODS: dict[str, Method[Any]] = {
    method.peft_type: method for method in (Lora(), PromptTuning(), PrefixTuning(), PTuning())
}


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a config belongs to."""
    return method_named(config.peft_type, type(config).__name__)


def method_named(peft_type: object, source: str) -> Method[Any]:
    """The method of a ``peft_type`` as it stands in ``adapter_config.json``.

    Raises:
        AdapterError: no such method; the known ones are listed.
    """
    method = METHODS.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        raise AdapterError(f"{source}: peft_type: expected one of {', '.join(METHODS)}, found {peft_type!r}")
    return method
