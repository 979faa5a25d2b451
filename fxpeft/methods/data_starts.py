"""Starts of a LoRA that follow from data: CorDA, from what its sites see, and LoRA-GA, from gradients of their weights.

:func:`fxpeft.initialize_corda` and :func:`fxpeft.initialize_lora_ga` gather these, and give a fresh adapter its
factors, which are taken off again as those of PiSSA: see :mod:`fxpeft.methods.inits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxpeft.errors import AdapterError, short

NAMES = ("corda", "lora_ga")
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
DAMPED = 40  # times that the damping of a covariance is doubled at most


@dataclass
class CordaConfig:
    """``init_lora_weights="corda"`` (https://arxiv.org/abs/2406.05223): ``peft.CordaConfig``.

    Args:
        corda_method: ``"ipm"``: the components in which the data is largest; ``"kpm"``: those where it is least.
        use_float16_for_covariance: of the sites' inputs.
        cache_file, covariance_file, verbose, prune_temporary_fields: accepted; nothing is cached here.

    Raises:
        AdapterError: another method.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise AdapterError(f"corda_config.corda_method: expected 'ipm' or 'kpm', found {short(self.corda_method)}")


@dataclass
class LoraGAConfig:
    """``init_lora_weights="lora_ga"`` (https://arxiv.org/abs/2407.05000): ``peft.LoraGAConfig``.

    Args:
        direction: which of the gradient's components go to A and which to B. scale: how large they are.

    Raises:
        AdapterError: an unknown word, or ``stable_gamma`` not above zero.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, known in (("direction", DIRECTIONS), ("scale", SCALES)):
            if (found := getattr(self, name)) not in known:
                raise AdapterError(f"lora_ga_config.{name}: expected one of {', '.join(known)}, found {short(found)}")
        gamma = self.stable_gamma
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or gamma <= 0:
            raise AdapterError(f"lora_ga_config.stable_gamma: expected a number above zero, found {short(gamma)}")


def corda(weight: Tensor, covariance: Tensor, rank: int, scale: float, method: str) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` by the inputs' covariance ``[in, in]``; ``scale * B A`` is a part of W.

    Raises:
        AdapterError: no damping makes the covariance one that can be inverted.
    """
    one, damp = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device), 0.01
    for _ in range(DAMPED):
        damped = covariance + one * (covariance.diagonal().mean() * damp)
        inverse, info = torch.linalg.inv_ex(damped)
        if not int(info) and float(torch.dist(damped @ inverse, one)) < 0.05:
            break
        damp *= 2
    else:
        raise AdapterError("the covariance of its inputs can't be inverted; give it other data, or more")
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    picked = slice(None, rank) if method == "ipm" else slice(-rank, None)
    root = (s[picked] / scale).sqrt()
    return (vh @ inverse)[picked] * root[:, None], u[:, picked] * root


def lora_ga(weight: Tensor, grad: Tensor, rank: int, scale: float, config: LoraGAConfig) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` of the weight's gradient ``[out, in]``."""
    u, s, v = torch.svd_lowrank(grad, q=min(4 * rank, *grad.shape), niter=4)
    u, s, vh = u[:, : 2 * rank], s[: 2 * rank], v.t()[: 2 * rank]
    numbers = torch.arange(2 * rank, device=grad.device)
    if config.direction == "random":
        of_a = of_b = torch.randperm(2 * rank)[:rank].to(grad.device)
    else:
        of_a, of_b = {
            "ArBr": (numbers[1::2], numbers[::2]), "A2rBr": (numbers[rank:], numbers[:rank]),
            "ArB2r": (numbers[:rank], numbers[rank:]),
        }[config.direction]  # fmt: skip
    a, b = vh[of_a], u[:, of_b] * s[of_b]
    if config.scale == "stable":
        b = b * (len(weight) ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd" and s[of_b][0] > 0:
        b = b * (torch.svd_lowrank(weight, q=rank, niter=4)[1][0] / s[of_b][0])
    elif config.scale == "gd_scale":
        a, b = a / scale, b / scale
    return a, b
