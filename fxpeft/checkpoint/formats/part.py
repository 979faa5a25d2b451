"""What image tools write of one site, whatever their files call it: factors, alpha, magnitude."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fxpeft.errors import CheckpointError, listing

_SITE = re.compile(
    r"(?P<site>.+)\.(?:(?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight|lora_(?P<kohya>down|up)\.weight"
    r"|lora_(?P<peft>A|B)(?:\.default)?\.(?P<leaf>weight|bias)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.weight)?|(?P<alpha>alpha))"
)
_OTHERS = re.compile(
    r".+\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_[wt]\d(?:_[ab])?|lora_mid|oft_\w+|boft_\w+)(?:\.\w+)?"
)
_OTHER = {"hada": "LoHa", "lokr": "LoKr", "lora": "LoCon with a third factor", "oft": "OFT", "boft": "BOFT"}
_NAMED = {"down": "lora_A", "up": "lora_B", "A": "lora_A", "B": "lora_B"}


@dataclass
class Part:
    """One component's adapter, as a file has it.

    Args:
        tensors: PEFT's keys without its prefix. alphas: site -> alpha, where the file says it.
        settings: fields of a LoraConfig that the file's metadata holds, or ``None``.
        flat: sites have ``_`` in the place of the dots of their names.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    flat: bool = False

    def sites(self) -> list[str]:
        """The sites that have factors."""
        return [key.removesuffix(".lora_A.weight") for key in self.tensors if key.endswith(".lora_A.weight")]


class CheckpointFormat(Protocol):
    """A format: whether a file's keys are its, and what they say."""

    name: str

    def reads(self, keys: Iterable[str]) -> bool:
        """Whether a file with these keys is of this format."""
        ...

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, Part]:
        """Component -> its adapter; ``""`` for a file that names none.

        Raises:
            CheckpointError: a method that the keys of LoRA can't say, or two tensors of one place.
        """
        ...


def is_lora(key: str) -> bool:
    """Whether a key is one of those that image tools write for a LoRA, or for a relative of it."""
    return _SITE.fullmatch(key) is not None or _OTHERS.fullmatch(key) is not None


def check_method(keys: Iterable[str], source: str) -> None:
    """Refuse LyCORIS's methods that are no LoRA, by name."""
    found: dict[str, list[str]] = {}
    for key in keys:
        if (match := _OTHERS.fullmatch(key)) is not None:
            found.setdefault(_OTHER[match["part"].partition("_")[0]], []).append(key)
    if found:
        lines = [f"{method}: {key}" for method, own in found.items() for key in own]
        raise CheckpointError(f"{source}: expected LoRA's keys, found those of another method:\n{listing(lines)}")


def add(part: Part, key: str, tensor: Tensor, source: str) -> None:
    """Put a tensor under PEFT's key into a part. What is no LoRA's keeps its key, and whoever assigns it tells of it.

    Raises:
        CheckpointError: an alpha that is no finite number, or a place that has a tensor already.
    """
    match = _SITE.fullmatch(key)
    name = key
    if match is not None:
        site = match["site"]
        if match["alpha"]:
            if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)):
                raise CheckpointError(f"{source}: {key}: expected one finite number, found {list(tensor.shape)}")
            part.alphas[site] = alpha
            return
        if match["magnitude"]:
            name = f"{site}.lora_magnitude_vector"
            tensor = _vector(tensor, key, source) if match["magnitude"] == "dora_scale" else tensor
        else:
            name = f"{site}.{_NAMED[match['old'] or match['kohya'] or match['peft']]}.{match['leaf'] or 'weight'}"
    if name in part.tensors:
        raise CheckpointError(f"{source}: two tensors have the place {name}; the second is {key}")
    part.tensors[name] = tensor


def shaped(part: Part) -> Part:
    """The part, its magnitudes as PEFT has them: a vector, and at a convolution ``[1, out, 1, ...]``."""
    for key, tensor in part.tensors.items():
        a = part.tensors.get(key.replace(".lora_magnitude_vector", ".lora_A.weight"))
        if key.endswith(".lora_magnitude_vector") and a is not None and a.ndim > 2:
            part.tensors[key] = tensor.reshape(1, -1, *[1] * (a.ndim - 2))
    return part


def _vector(tensor: Tensor, key: str, source: str) -> Tensor:
    """One number per output, of kohya's and LyCORIS's ``[out, 1, ...]``."""
    if tensor.dim() > 1 and tensor.shape[0] != tensor.numel():
        raise CheckpointError(
            f"{source}: {key}: expected a magnitude per output, [out, 1], found {list(tensor.shape)}: LyCORIS writes "
            "one per input where it isn't told to decompose by outputs, which is no DoRA of PEFT's"
        )
    return tensor.flatten()
