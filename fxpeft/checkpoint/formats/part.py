"""What image tools write of one site, whatever their files call it: factors, alpha, magnitude."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fxpeft.errors import CheckpointError, listing

_SITE = re.compile(
    r"(?P<site>.+)\.(?:(?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight|lora_(?P<kohya>down|up)\.weight"
    r"|lora_(?P<peft>A|B)(?:\.default)?\.(?P<leaf>weight|bias)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.weight)?|(?P<alpha>alpha)"
    r"|(?P<whole>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|lora_mid|[wb]_norm)(?:\.weight)?)"
)
#: keys of LyCORIS's methods that nothing here is, by what they end with
_REFUSED = {
    "oft_blocks": "OFT or BOFT", "oft_diag": "OFT", "boft_blocks": "BOFT", "lokr_t1": "LoKr with a core for W1",
    "on_input": "IA3, whose gains LyCORIS doesn't apply to biases", "a1.weight": "GLoRA", "b1.weight": "GLoRA",
    "q_layer.weight": "T-LoRA", "lambda_layer": "T-LoRA", "scalar": "a factor that LyCORIS trains beside others",
}  # fmt: skip
#: of names without dots, which no class of diffusers' pipelines reads either
_REFUSED_FLAT = {"diff": "full, differences of whole weights", "diff_b": "full, differences of biases"}
_FACTOR = re.compile(r"(?P<site>.+)\.(?:lora_A\.weight|hada_w1_a|lokr_w1(?:_a)?)")
_KEY = re.compile(r"(?P<site>.+?)\.(?P<part>(?:lora|hada|lokr)_.+|[wb]_norm)")
LYCORIS = ("hada_", "lokr_")
MOST = 2**30  # numbers of what a file's factors are multiplied to, where nothing else bounds it
NORM = {"w_norm": "weight", "b_norm": "bias"}
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
        return [match["site"] for key in self.tensors if (match := _FACTOR.fullmatch(key))]

    def modules(self) -> list[str]:
        """The sites, and the norms that it brings."""
        norms = [key.removesuffix(".w_norm") for key in self.tensors if key.endswith(".w_norm")]
        return [*self.sites(), *norms]

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """Site -> what follows its name in a key -> tensor."""
        found: dict[str, dict[str, Tensor]] = {site: {} for site in self.sites()}
        for key, tensor in self.tensors.items():
            if (place := split(key)) is not None and place[0] in found:
                found[place[0]][place[1]] = tensor
        return found

    def of_lycoris(self) -> bool:
        """Whether a site has other factors than a LoRA's."""
        return any(f".{start}" in key for key in self.tensors for start in LYCORIS)


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
    return _SITE.fullmatch(key) is not None or _refused(key) is not None


def split(key: str) -> tuple[str, str] | None:
    """A key's site and what follows; ``None`` of a key that is no site's."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match["site"], match["part"])


def check_method(keys: Iterable[str], source: str, *, flat: bool = False) -> None:
    """Refuse LyCORIS's methods that nothing here is, by name.

    Args:
        flat: sites have ``_`` in the place of the dots of their names.
    """
    if lines := [f"{method}: {key}" for key in keys if (method := _refused(key, flat)) is not None]:
        raise CheckpointError(
            f"{source}: expected the keys of LoRA, LoHa or LoKr, found those of another method:\n{listing(lines)}"
        )


def _refused(key: str, flat: bool = False) -> str | None:
    ends = {**_REFUSED, **_REFUSED_FLAT} if flat else _REFUSED
    return next((method for end, method in ends.items() if key.endswith(f".{end}")), None)


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
        elif match["whole"]:
            name = f"{site}.{match['whole']}"
        else:
            name = f"{site}.{_NAMED[match['old'] or match['kohya'] or match['peft']]}.{match['leaf'] or 'weight'}"
    if name in part.tensors:
        raise CheckpointError(f"{source}: two tensors have the place {name}; the second is {key}")
    part.tensors[name] = tensor


def shaped(part: Part) -> Part:
    """The part as PEFT has it: a magnitude is a vector, and at a convolution ``[1, out, 1, ...]``.

    A third factor between A and B, ``[rank, rank, *kernel]``, goes into A, as the rank stays.
    """
    for key in [key for key in part.tensors if key.endswith(".lora_mid")]:
        name = key.replace(".lora_mid", ".lora_A.weight")
        core, a = part.tensors[key], part.tensors.get(name)
        if a is None or a.dim() < 2 or tuple(core.shape[:2]) != (len(a), len(a)):
            continue  # whoever assigns it tells
        if core.numel() * a[:1].numel() <= MOST * len(a):
            dtype = torch.promote_types(torch.promote_types(core.dtype, a.dtype), torch.float32)
            part.tensors[name] = torch.einsum("ij...,jr->ir...", core.to(dtype), a.to(dtype).flatten(1))
            del part.tensors[key]
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
