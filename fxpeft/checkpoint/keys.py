"""Keys of an adapter's tensors: what wrappers and PEFT's modules in memory add to the names that its files have."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from fxpeft.errors import CheckpointError, listing
from fxpeft.model.wrappers import INNER, plain_name

# PEFT's names of parameters below a site; an adapter's name may follow, as in PEFT's modules, and then weight or bias
PART = re.compile(
    r"(?P<site>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_E|lora_ranknum|ia3_l)"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
# at a glance, over all keys at once: most files have none of it, and a swap reads one each time
_ODD = re.compile(
    rf"\b(?:{'|'.join(INNER)})\.|^module\.base_model\.|\.lora_magnitude_vector\.|"
    r"\.(?:lora_(?:embedding_)?[AB]|lora_E|lora_ranknum|ia3_l)\.(?!(?:weight|bias)$)",
    re.MULTILINE,
)


def file_keys(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """An adapter's tensors under the keys that PEFT's files have: without wrappers' names and the adapter's.

    Raises:
        CheckpointError: tensors of several adapters, or two of one place.
    """
    if not _ODD.search("\n".join(tensors)):
        return dict(tensors)
    names = {m["name"] for key in tensors if (m := PART.fullmatch(key)) and m["name"]}
    if len(names) > 1:
        raise CheckpointError(f"{source}: expected one adapter's tensors, found those of {', '.join(sorted(names))}")
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = _in_file(plain_name(key).removeprefix("module."), names)
        if plain in out:
            raise CheckpointError(f"{source}: two tensors have the place {plain}; are they of two adapters?")
        out[plain] = tensor
    return out


def _in_file(key: str, names: set[str]) -> str:
    match = PART.fullmatch(key)
    if match is not None:
        leaf = match["leaf"] if match["part"] in ("lora_A", "lora_B") else None
        return ".".join(atom for atom in (match["site"], match["part"], leaf) if atom)
    for name in names:
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
    sites = {m["site"] for key in tensors if (m := PART.fullmatch(key)) and m["part"] in ("lora_A", "ia3_l")}
    base = [key for key in tensors if key.endswith(".base_layer.weight") and key.rpartition(".base_layer.")[0] in sites]
    if base:
        raise CheckpointError(
            f"{source}: expected an adapter's tensors, found the base's too:\n{listing(base)}\n"
            "Pass what adapter_state_dict gives, or peft.get_peft_model_state_dict"
        )
