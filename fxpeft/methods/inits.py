"""How a LoRA may start: the choices of ``init_lora_weights`` that compute its factors from the base's weight.

Plain functions of a weight ``[out, in]`` in float32, whose factors are A ``[rank, in]`` and B
``[out, rank]``, as in PEFT's ``tuners/lora/layer.py``. PEFT takes the first update of PiSSA and OLoRA
off the base's weight. Here the base stays what it is, and the adapter keeps the factors it started
from: its update is ``scale * (B A - B0 A0)``, the same function with the same gradients.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.methods import data_starts
from fxpeft.passes.targets.kinds import Kind

NAMES = ("gaussian", "orthogonal", "pissa", "olora", "eva", "loftq", "mica", *data_starts.NAMES)  # and pissa_niter_N
BLOCK = 64  # numbers that share one scale in NF4, bitsandbytes' default


@dataclass
class LoftQConfig:
    """``init_lora_weights="loftq"`` (https://arxiv.org/abs/2310.08659): ``peft.LoftQConfig``.

    Args:
        loftq_bits: 4 (NF4) or 8 (row-wise int8). loftq_iter: rounds of quantising and decomposing.

    Raises:
        AdapterError: another number of bits, or no round.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8) or isinstance(self.loftq_bits, bool):
            raise AdapterError(f"loftq_bits: expected 4 or 8, found {self.loftq_bits!r}")
        if type(self.loftq_iter) is not int or self.loftq_iter < 1:
            raise AdapterError(f"loftq_iter: expected a positive integer, found {self.loftq_iter!r}")


@dataclass
class EvaConfig:
    """``init_lora_weights="eva"`` (https://arxiv.org/abs/2410.07170): ``peft.EvaConfig``.

    Args:
        rho: a site gets at most ``rho`` times its rank; 1: ranks stay as they are.
        tau: cosine similarity to the step before at which a component has converged.
        use_label_mask: leave out tokens whose label is ``label_mask_value``.
        whiten: divide each component by the root of its singular value.
        adjust_scaling_factors: let alpha follow the rank, so that the scale stays.

    Raises:
        AdapterError: ``rho`` below 1, or ``tau`` not between 0 and 1.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for name in ("rho", "tau"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise AdapterError(f"eva_config.{name}: expected a number, found {getattr(self, name)!r}")
        if not self.rho >= 1:
            raise AdapterError(f"eva_config.rho: expected at least 1, found {self.rho}")
        if not 0 <= self.tau <= 1:
            raise AdapterError(f"eva_config.tau: expected a number between 0 and 1, found {self.tau}")


def check_name(name: object) -> None:
    """Refuse what is no ``init_lora_weights``."""
    if not isinstance(name, bool) and not (isinstance(name, str) and (name in NAMES or iterations(name))):
        raise AdapterError(
            f"init_lora_weights: expected True, False, {', '.join(map(repr, NAMES))} or 'pissa_niter_16' (any positive "
            f"number), found {name!r}"
        )


def iterations(name: object) -> int | None:
    """N of ``pissa_niter_N``."""
    found = re.fullmatch(r"pissa_niter_([1-9]\d*)", name) if isinstance(name, str) else None
    return int(found[1]) if found else None


def starts_from_base(name: object) -> bool:
    """Whether the first update is a part of the base's weight, which has to be taken off."""
    return name in ("pissa", "olora") or iterations(name) is not None


def has_start(name: object) -> bool:
    """Whether the first update has to be taken off, whatever it follows from."""
    return starts_from_base(name) or name in data_starts.NAMES


def check_site(name: object, site: str, kind: Kind, rank: int) -> None:
    """Refuse a start that a site can't have.

    Raises:
        AdapterError: a kind or a rank that it is not defined for; the site is named.
    """
    if isinstance(name, bool) or name == "gaussian":
        return
    if not kind.is_linear:
        if kind.looks_up and name == "mica" and rank > min(kind.in_features, kind.out_features):
            raise AdapterError(f"{site}: init_lora_weights='mica': expected a rank of the weight's, found {rank}")
        if kind.looks_up and name != "loftq":
            return  # PEFT: an embedding starts as with True, but for mica
        raise AdapterError(
            f"{site}: init_lora_weights={name!r} is for linear layers, as in PEFT, found {kind.name}; leave the site "
            "out or set init_lora_weights=True"
        )
    least = min(kind.in_features, kind.out_features)
    if name == "orthogonal" and rank % 2:
        raise AdapterError(f"{site}: init_lora_weights='orthogonal' needs an even rank, found {rank}")
    if (has_start(name) or name in ("loftq", "mica")) and rank > least // (2 if name == "lora_ga" else 1):
        raise AdapterError(
            f"{site}: init_lora_weights={name!r} gives at most {least} ranks to a weight of {kind.out_features} x "
            f"{kind.in_features}, found rank {rank}; lower r or set it in rank_pattern"
        )


def first_factors(name: object, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B of a start that is a part of the base's weight."""
    return olora(weight, rank) if name == "olora" else pissa(weight, rank, scale, iterations(name))


def pissa(weight: Tensor, rank: int, scale: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """The principal part of the weight, ``scale * B A`` (https://arxiv.org/abs/2404.02948).

    Args:
        niter: find it with so many subspace iterations from a random start, fast and inexact.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=niter)
        vh = v.t()
    root = (s / scale).sqrt()
    return root[:, None] * vh, u * root


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first rows and columns of the weight's QR decomposition (https://arxiv.org/abs/2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def minor(weight: Tensor, rank: int) -> Tensor:
    """B ``[out, rank]`` of MiCA (https://arxiv.org/abs/2604.01694): the left singular vectors of the least values."""
    left: Tensor = torch.linalg.svd(weight, full_matrices=False)[0]
    return left[:, -rank:]


def orthogonal(rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Random factors from the even and the odd rows of an orthogonal matrix, so that ``B A`` is zero.

    https://datta0.github.io/posts/rethink-lora-init/ ; drawn on the CPU in PEFT's order.
    """
    q, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float32))
    a = torch.randn(in_features, rank // 2, dtype=torch.float32).mm(q[0::2]).t() / 10
    b = torch.randn(rank // 2, out_features, dtype=torch.float32).t().mm(q[1::2]) / 10
    return a, b


def loftq(weight: Tensor, rank: int, bits: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantised weight, and factors that make up for what it lost: ``Q + B A`` is near the weight.

    Returns:
        Q [out, in], A and B. As in PEFT the adapter's scale is not divided out, so alpha should be r.
    """
    rest = weight
    for _ in range(rounds):
        q = quantised(rest, bits)
        u, s, vh = torch.linalg.svd(weight - q, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        rest = weight - b @ a
    return q, a, b


def quantised(weight: Tensor, bits: int) -> Tensor:
    """The weight as bitsandbytes gives it back: NF4 in blocks of 64, or int8 row by row (from float16)."""
    if bits == 8:
        half = weight.half()
        top = half.abs().amax(1, keepdim=True).float()
        return torch.round(half * (127 / top)).nan_to_num(0) * (top / 127)
    flat = weight.flatten()
    short = -flat.numel() % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    codes = nf4_codes().to(weight.device)
    nearest = torch.bucketize(blocks * (1 / top.clamp(min=1e-38)), (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * top).flatten()[: flat.numel()].view_as(weight)


@functools.cache
def nf4_codes() -> Tensor:
    """The 16 numbers of NF4: quantiles of a normal distribution, with zero among them.

    https://arxiv.org/abs/2305.14314, section 3, as bitsandbytes' ``create_normal_map`` computes them.
    """
    offset = 0.9677083  # bitsandbytes': the mean of 1 - 1/30 and 1 - 1/32
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (codes / codes.max()).float()
