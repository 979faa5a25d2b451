"""Sites as LyCORIS writes them, and what its formulas make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from image_models import random
from torch import Tensor, nn


def update(own: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """LyCORIS' own formulas, in the shape of a weight."""

    def product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
        return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)

    t = {key.removesuffix(".weight"): tensor for key, tensor in own.items()}
    rank = next((len(t[n]) for n in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if n in t), None)
    scale = float(t["alpha"]) / rank if "alpha" in t and rank else 1.0
    if "lora_down" in t:
        down, up = t["lora_down"].flatten(1), t["lora_up"].flatten(1)
        made = up @ down if "lora_mid" not in t else product(up.t(), down, t["lora_mid"])
    elif "hada_w1_a" in t:
        one, two = (product(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in (1, 2))
        made = one * two
    else:
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else product(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
        made = torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2.contiguous())
    return made.reshape(shape) * scale


def merged(model: nn.Module, sites: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """The model with all updates in its weights."""
    for site, own in sites.items():
        module: Any = model.get_submodule(site)
        if "w_norm" in own:
            module.weight.data += own["w_norm"]
            module.bias.data += own["b_norm"]
            continue
        weight = module.weight.data + update(own, module.weight.shape)
        if "dora_scale" in own:
            norm = weight.flatten(1).norm(dim=1)
            weight = weight * (own["dora_scale"].flatten() / norm).view(-1, *(1 for _ in weight.shape[1:]))
        module.weight.data = weight
    return model


def factors(seed: int, alpha: float | None = None, /, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    made = {name: 0.4 * random(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}
    return made if alpha is None else made | {"alpha": torch.tensor(alpha)}


def low_rank(seed: int, out: int, into: int, *kernel: int, alpha: float = 2.0) -> dict[str, Tensor]:
    ones = (1 for _ in kernel)
    own = {"lora_down.weight": (3, into, *kernel), "lora_up.weight": (out, 3, *ones)}
    return factors(seed, alpha, **own)


def loha(seed: int, out: int, into: int, *kernel: int, alpha: float = 3.0) -> dict[str, Tensor]:
    sizes = {"a": (out, 2), "b": (2, into * math.prod(kernel))}
    return factors(seed, alpha, **{f"hada_w{i}_{side}": size for i in (1, 2) for side, size in sizes.items()})
