"""A scale that a call asks for: diffusers' ``cross_attention_kwargs={"scale": 0.5}`` and the like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fxpeft.passes.torch_private import skip_frame

_OWNER = "diffusers.utils.peft_utils"  # where its apply_lora_scale(kwargs_name) makes the forwards that take one


def scale_argument(forward: Callable[..., Any]) -> str | None:
    """The argument in which a forward takes a scale of its adapters, or ``None``."""
    function: Any = forward
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and getattr(function, "__globals__", {}).get("__name__") == _OWNER:
            name = inspect.getclosurevars(function).nonlocals.get("kwargs_name")
            return name if isinstance(name, str) else None
        function = getattr(function, "__wrapped__", None)
    return None


def take_scale(name: str, kwargs: dict[str, Any]) -> float | None:
    """Take the scale out of a call's arguments; ``None`` where it has none.

    Its owner would take it out too, and then look for PEFT's layers; and to Dynamo, which sees what is left, every
    other number is another graph. So is an argument that is empty or isn't there: those go too.
    """
    given = kwargs.get(name)
    scale = None
    if isinstance(given, Mapping) and "scale" in given:
        scale = float(given["scale"])
        given = {key: value for key, value in given.items() if key != "scale"}
        kwargs[name] = given
    if not given:
        kwargs.pop(name, None)
    return scale


skip_frame(take_scale, deep=True)
