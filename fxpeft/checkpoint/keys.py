"""Keys of an adapter's tensors: what wrappers and PEFT's modules in memory add to the names that its files have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from fxpeft.errors import CheckpointError, listing
from fxpeft.methods import METHODS
from fxpeft.methods.base import Method
from fxpeft.model.wrappers import INNER, plain_name
from fxpeft.passes.targets.operations.registry import kinds

# parts of PEFT's modules that fxpeft has no parameter for, or no site
_MORE = ("lora_ranknum", "token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
_LEAVES = "weight|bias|vector_a|vector_b"
_MAGNITUDE = "lora_magnitude_vector"  # the one part that is a weight in memory and none in a file


@dataclass(frozen=True)
class Parts:
    """The names that PEFT's keys have below a site.

    Args:
        part: a key in its parts: ``site``, ``part``, and what may follow: an adapter's ``name``, as in PEFT's modules,
            and ``leaf``, weight or bias, or one of PSOFT's vectors.
        odd: whether any of many keys, one a line, has what a file has not: most files have none of it, and a swap
            reads one each time.
        leafed: the parts that are followed by a leaf in files too.
        bare: keys that name no module.
    """

    part: re.Pattern[str]
    odd: re.Pattern[str]
    leafed: frozenset[str]
    bare: frozenset[str]

    def is_bare(self, key: str) -> bool:
        """Whether a key names no module; what there is several of, as TinyLoRA's vectors, is numbered."""
        whole, _, number = key.rpartition(".")
        return key in self.bare or (number.isdecimal() and whole in self.bare)


def parts_known() -> Parts:
    """Those of all methods that there are now."""
    return _parts(tuple(METHODS))


@lru_cache(maxsize=8)
def _parts(methods: Sequence[Method[Any]]) -> Parts:
    keys = {key for method in methods if method.targeted for kind in kinds() for key in method.keys(kind).values()}
    leaves = tuple(f".{leaf}" for leaf in _LEAVES.split("|"))
    whole = {key for key in keys if "." in key and not key.endswith(leaves)}  # of which an adapter's name is inside
    inner = "|".join(sorted({re.escape(key.rpartition(".")[2]) for key in whole} | {r"\d+"}, key=len, reverse=True))
    numbered = {part for method in methods for part in method.numbered}
    leafed = frozenset({"ln_tuning_layers", *numbered} | {key.rpartition(".")[0] for key in keys if "." in key})
    names = keys - {key for key in keys if key.endswith(leaves)} | leafed | {*_MORE}
    every = "|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name))))
    if numbered:
        every = rf"(?:{'|'.join(sorted(numbered))})\.\d+|{every}"
    return Parts(
        re.compile(
            rf"(?P<site>.+?)\.(?P<part>{every})(?:\.(?P<name>(?!(?:{_LEAVES})$)[^.]+))?(?:\.(?P<leaf>{_LEAVES}|{inner}))?"
        ),
        re.compile(
            rf"\b(?:{'|'.join(INNER)})\.|^module\.base_model\.|\.{_MAGNITUDE}\.|\.(?:{every})\.(?!(?:{_LEAVES})$)",
            re.MULTILINE,
        ),
        leafed,
        frozenset(key for method in methods for key in method.bare_keys()),
    )


def file_keys(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """An adapter's tensors under the keys that PEFT's files have: without wrappers' names and the adapter's.

    Raises:
        CheckpointError: tensors of several adapters, or two of one place.
    """
    parts = parts_known()
    if not parts.odd.search("\n".join(tensors)):
        return dict(tensors)
    names = {m["name"] for key in tensors if (m := parts.part.fullmatch(key)) and m["name"]}
    if len(names) > 1:
        raise CheckpointError(f"{source}: expected one adapter's tensors, found those of {', '.join(sorted(names))}")
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = _in_file(plain_name(key).removeprefix("module."), names, parts)
        if plain in out:
            raise CheckpointError(f"{source}: two tensors have the place {plain}; are they of two adapters?")
        out[plain] = tensor
    return out


def _in_file(key: str, names: set[str], parts: Parts) -> str:
    match = parts.part.fullmatch(key)
    if match is not None:
        leaf = match["leaf"] if match["part"] in parts.leafed else None
        return ".".join(atom for atom in (match["site"], match["part"], leaf) if atom)
    for name in names:
        for bare in (key.removesuffix(f".{name}"), key.replace(f".{name}.", ".")):
            if parts.is_bare(bare):
                return bare
        key = key.replace(f".modules_to_save.{name}.", ".")
    return key


def apart(tensors: Mapping[str, Tensor], shared_keys: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that all sites share, whose keys name no module, and the others."""
    own = set(shared_keys.values())
    shared = {key: tensor for key, tensor in tensors.items() if key in own}
    return shared, {key: tensor for key, tensor in tensors.items() if key not in own}


def below_module(model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors without ``module.``, which DDP puts before every name, where the model has no such child.

    Args:
        prefix: PEFT's, which comes first or is missing.
    """
    inner = [key.removeprefix(prefix) for key in tensors]
    if "module" in model._modules or not inner or not all(key.startswith("module.") for key in inner):
        return tensors
    return {
        f"{prefix if key.startswith(prefix) else ''}{short.removeprefix('module.')}": tensor
        for (key, tensor), short in zip(tensors.items(), inner, strict=True)
    }


def check_adapters_own(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse a whole model's tensors; an embedding's weight is in PEFT's files, since it may have new rows.

    Raises:
        CheckpointError: the sites' own weights are among them.
    """
    part = parts_known().part
    sites = {m["site"] for key in tensors if (m := part.fullmatch(key)) and not m["part"].startswith("lora_embedding_")}
    base = [key for key in tensors if key.endswith(".base_layer.weight") and key.rpartition(".base_layer.")[0] in sites]
    if base:
        raise CheckpointError(
            f"{source}: expected an adapter's tensors, found the base's too:\n{listing(base)}\n"
            "Pass what adapter_state_dict gives, or peft.get_peft_model_state_dict"
        )
