"""A Kronecker product as an update of its own: ``y += (W1 kron W2) x``, as two small products.

An input's features are seen as ``[i1, i2]``; W2, ``[o2, i2, *kernel]``, is applied to the i2 as the target's own weight
would be, a convolution with the i1 groups beside the batch, and then W1, ``[o1, i1]``, to the i1. Of 4096 inputs and
outputs that are 64 x 64 each it multiplies 2 * 64^3 times a token, as a LoRA of 64 ranks, where the product itself is
of full rank. W1 and W2 are zero for none.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

KRONECKER = frozenset(("w1", "w2"))  # the features of a slot that has a place for one
Shapes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the smaller one first, as PEFT finds them.

    They are ``factor`` and its partner where that divides it, else the two nearest to each other of which the smaller
    one is not above ``factor`` (-1: whatever it is).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    best = max((m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= most), default=1)
    return best, size // best


def shapes(kind: Kind, factor: int) -> Shapes:
    """The shapes of W1 and W2 at a target whose outputs and inputs are taken apart by ``factor``."""
    (o1, o2), (i1, i2) = (two_factors(size, factor) for size in (kind.out_features, kind.in_features))
    return (o1, i1), (o2, i2, *kind.kernel)


def work(kind: Kind, factor: int) -> int:
    """How often :func:`product` multiplies for a token, or a position of a convolution's output."""
    (o1, i1), (o2, *inner) = shapes(kind, factor)
    return i1 * o2 * (math.prod(inner) + o1)


def product(kind: Kind, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """What it adds to the target's output, in the dtype of W2."""
    settings = [getattr(kind, name) for name in ("stride", "padding", "dilation")] if kind.kernel else []
    return _product(x, w1, w2, *settings)


@one_node
def _product(x: Tensor, w1: Tensor, w2: Tensor, *settings: Any) -> Tensor:
    n, (o1, i1) = w2.ndim - 2, w1.shape
    leading = x.shape[: x.ndim - n - 1]
    parts: Any = x.type_as(w2).unflatten(-1 - n, (i1, w2.shape[1]))  # type: ignore[no-untyped-call]
    parts = parts.flatten(0, -2 - n)  # [leading * i1, i2, *sizes]
    h = F.linear(parts, w2) if not n else (F.conv1d, F.conv2d, F.conv3d)[n - 1](parts, w2, None, *settings)
    out = torch.matmul(w1, h.flatten(1).view(*leading, i1, -1))
    return out.view(*leading, o1 * w2.shape[0], *h.shape[2:])
