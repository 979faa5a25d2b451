"""Convolutions as products, whose number of ranks may be symbolic.

Inductor's convolution asks for every size of its weight: an A that was narrowed to the rank in use would be compiled
for that rank and no other. A product asks for none, and costs what the rank in use costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.targets.one_node import one_node

FEW = 8  # input channels below which patches are smaller than what the products of a usual rank make


@one_node
def mix(x: Tensor, weight: Tensor, spatial: int) -> Tensor:
    """A convolution with a kernel of ones: ``[..., in, *sizes]`` and ``[out, in]`` to ``[..., out, *sizes]``.

    Args:
        spatial: how many sizes there are; before the channels there may be a batch or nothing.
    """
    return _unflatten(torch.matmul(weight, x.flatten(-spatial)), -1, x.shape[-spatial:])


@one_node
def convolve(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """``F.conv1d`` / ``conv2d`` / ``conv3d`` without a bias or groups.

    One product gives every rank's share at every kernel position, and a sum over shifted views of that adds the shares
    up: nothing of the input is copied but its padding. With a stride most of these shares would be thrown away, and
    of few channels they are more than there is to read, so there the input's patches are multiplied.

    Args:
        x: ``[..., in, *sizes]``, with a batch or without.
        weight: ``[out, in, *kernel]``; ``out`` may be symbolic.
        stride, padding, dilation: as those functions take them.
    """
    kernel = weight.shape[2:]
    n = len(kernel)
    strides, gaps = _each(stride, n), _each(dilation, n)
    pads = _pads(padding, kernel, gaps)
    if any(pads):
        x = F.pad(x, pads)
    if all(step == 1 for step in strides) and math.prod(kernel) == 1:
        return mix(x, weight.flatten(1), n)
    if all(step == 1 for step in strides) and weight.shape[1] >= FEW:
        return _sum_of_shifts(x, weight, gaps)
    return _product_of_patches(x, weight, strides, gaps)


def _sum_of_shifts(x: Tensor, weight: Tensor, gaps: Sequence[int]) -> Tensor:
    kernel, n = weight.shape[2:], len(gaps)
    shares = mix(x, weight.movedim(1, -1).flatten(0, -2), n)
    shares = _unflatten(shares, -n - 1, (weight.shape[0], *kernel))  # [..., out, *kernel, *sizes]
    for size, gap in zip(kernel, gaps, strict=True):
        # of the output's window of inputs, the k-th is read at the kernel's k-th position
        shares = _windows(shares, -n, size, 1, gap).diagonal(0, -2 * n - 1, -1)
    return shares.sum(tuple(range(-n, 0)))  # of [..., out, *lengths, *kernel]


def _product_of_patches(x: Tensor, weight: Tensor, strides: Sequence[int], gaps: Sequence[int]) -> Tensor:
    kernel, n = weight.shape[2:], len(gaps)
    for size, step, gap in zip(kernel, strides, gaps, strict=True):
        x = _windows(x, -n, size, step, gap)
    lengths = x.shape[-2 * n : -n]  # [..., in, *lengths, *kernel]
    patches = x.movedim(tuple(range(-n, 0)), tuple(range(-2 * n, -n))).flatten(-n).flatten(-n - 2, -2)
    return _unflatten(torch.matmul(weight.flatten(1), patches), -1, lengths)


def _windows(x: Tensor, dimension: int, size: int, step: int, gap: int) -> Tensor:
    """A view with the windows of a dimension in its place, and each window's ``size`` elements last."""
    windows = x.unfold(dimension, gap * (size - 1) + 1, step)  # the size, an int to torch, may not be a symbolic one
    return windows[..., ::gap] if gap > 1 else windows


def _unflatten(x: Tensor, dimension: int, sizes: Sequence[int]) -> Tensor:
    parted: Tensor = x.unflatten(dimension, sizes)  # type: ignore[no-untyped-call]
    return parted


def _each(value: Any, count: int) -> tuple[int, ...]:
    """A setting of a convolution for each of its dimensions."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * count if len(values) == 1 else values


def _pads(padding: Any, kernel: Sequence[int], gaps: Sequence[int]) -> list[int]:
    """What ``F.pad`` takes: before and after, the last dimension first."""
    if padding == "valid":
        return []
    if padding == "same":
        both = [gap * (size - 1) for size, gap in zip(kernel, gaps, strict=True)]
        sides = [(total // 2, total - total // 2) for total in both]
    else:
        sides = [(each, each) for each in _each(padding, len(kernel))]
    return [each for side in reversed(sides) for each in side]
