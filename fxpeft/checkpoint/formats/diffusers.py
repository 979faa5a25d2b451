"""diffusers' ``pytorch_lora_weights.safetensors``: dotted names below a component's, in its three spellings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fxpeft.checkpoint.formats.part import Part, add, check_method, is_lora, shaped
from fxpeft.errors import CheckpointError
from fxpeft.methods.base import Method

METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header: fields of each component's LoraConfig
COMPONENT = re.compile(r"(?P<component>(?:unet|transformer|text_encoder)(?:_\d)?|prior|diffusion_model)\.(?P<key>.+)")
# attention processors held the factors before diffusers took PEFT's: q of an attention, or of a text encoder's
# xlabs' of Flux; a pipeline's class renames the sites
_OTHERS = re.compile(r"(?P<site>.+\.processor\.\w+_lora\d?)\.(?P<part>down|up)\.weight")
_PROCESSOR = re.compile(r"(?P<owner>.+?)(?:\.processor)?\.to_(?P<name>q|k|v|out)_lora\.(?P<part>down|up)\.weight")


class Diffusers:
    """``unet.down_blocks.0...to_q.lora_A.weight``, and what diffusers wrote before it took PEFT's names."""

    name = "diffusers"

    def reads(self, keys: Iterable[str]) -> bool:
        """Whether the keys are LoRA's, and none has PEFT's prefix."""
        return any(is_lora(key) or _PROCESSOR.fullmatch(key) or _OTHERS.fullmatch(key) for key in keys)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, Part]:
        """See :class:`~fxpeft.checkpoint.formats.part.CheckpointFormat`."""
        check_method(tensors, source)
        settings = _settings(metadata, source)
        parts: dict[str, Part] = {}
        for key, tensor in tensors.items():
            match = COMPONENT.fullmatch(key)
            component, rest = (match["component"], match["key"]) if match else ("", key.removeprefix(Method.prefix))
            part = parts.setdefault(component, Part(settings=settings.get(component)))
            add(part, _spelled(rest, text="text_encoder" in component), tensor, source)
        return {component: shaped(part) for component, part in parts.items()}


def _spelled(key: str, *, text: bool) -> str:
    """An attention processor's key as today's; others as they are."""
    match = _PROCESSOR.fullmatch(key)
    if match is None:
        other = _OTHERS.fullmatch(key)
        return key if other is None else f"{other['site']}.lora_{other['part']}.weight"
    name = match["name"]
    module = f"{name}_proj" if text else "to_out.0" if name == "out" else f"to_{name}"
    return f"{match['owner']}.{module}.lora.{match['part']}.weight"


def alpha_key(key: str) -> str:
    """The key under which a file says the alpha of a key that diffusers' converters name it by.

    They put ``.alpha`` behind a site, or behind all of the key of a factor in one of the older spellings.
    """
    factor = key.removesuffix(".alpha")
    match = COMPONENT.fullmatch(factor)
    before, rest = (f"{match['component']}.", match["key"]) if match else ("", factor)
    site = re.sub(r"\.lora(?:_linear_layer)?\.down\.weight$", "", _spelled(rest, text="text_encoder" in before))
    return f"{before}{site}.alpha"


def _settings(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
    """Component -> the fields of its config; diffusers joins both with a dot."""
    written = metadata.get(METADATA)
    if written is None:
        return {}
    try:
        values = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {METADATA} in its header: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: {METADATA} in its header: expected an object, found {type(values).__name__}")
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        match = COMPONENT.fullmatch(key)
        component, name = (match["component"], match["key"]) if match else ("", key)
        found.setdefault(component, {})[name] = value
    return found
