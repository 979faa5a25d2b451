"""Blocks of an input's features are each multiplied with a matrix: ``x' = x + x R`` by blocks, R zero for none.

R is kept as ``[blocks, size, size]``, the difference from the identity, so that rounding it changes little and a slot
that holds nothing passes the input on as it is. Blocks of a size are blocks of each multiple of it as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.base import PassError
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

BLOCK = 32  # PEFT's default of OFT


def block_of(features: int, wanted: int) -> int:
    """The size of blocks that divides the features and is nearest to the wanted one, as PEFT finds it."""
    if wanted >= features:
        return features
    lower = next(size for size in range(wanted, 0, -1) if features % size == 0)
    higher = next(size for size in range(wanted, features + 1) if features % size == 0)
    return lower if wanted - lower <= higher - wanted else higher


def widened(rotation: Tensor, size: int) -> Tensor:
    """``[blocks, own, own]`` as ``[fewer, size, size]``, with zeros off the blocks.

    Raises:
        PassError: own doesn't divide size.
    """
    count, own = rotation.shape[:2]
    if own == size:
        return rotation
    if size % own:
        raise PassError(
            f"blocks of {own} inputs don't fit its slot's of {size}: expected a size that divides these; prepare with "
            "max_block"
        )
    wide = rotation.new_zeros(count * own // size, size // own, own, size // own, own)
    wide.diagonal(dim1=1, dim2=3).copy_(rotation.view(-1, size // own, own, own).permute(0, 2, 3, 1))
    return wide.view(-1, size, size)


def fitted(rotation: Tensor, kind: Kind, block: int) -> Tensor:
    """A rotation as a site's slot holds it; ``PassError`` where it doesn't."""
    return widened(rotation, block_of(kind.in_features, block))


@one_node
def rotated(x: Tensor, rotation: Tensor, dimension: int) -> Tensor:
    """``x`` with its features, of which ``dimension`` says where they are, rotated by ``[blocks, size, size]``."""
    parts = _parts(x, rotation, dimension)
    turned = torch.bmm(parts.flatten(1, -2) if parts.ndim > 2 else parts.unsqueeze(1), rotation).view(parts.shape)
    return x + turned.movedim(0, -2).flatten(-2).movedim(-1, dimension).type_as(x)


@one_node
def rotated_rows(x: Tensor, rotations: Tensor, picks: Tensor, dimension: int) -> Tensor:
    """:func:`rotated` where rows, or tokens, have rotations of their own.

    Each is multiplied with all, which costs little beside the target's own product, and keeps its own.

    Args:
        rotations: ``[count, blocks, size, size]``. picks: which one a row has, as the leading dimensions of ``x``.
    """
    count, blocks, size = rotations.shape[:3]
    parts = _parts(x, rotations[0], dimension)  # [blocks, *leading, size]
    beside = rotations.permute(1, 2, 0, 3).reshape(blocks, size, count * size)
    turned = torch.bmm(parts.reshape(blocks, -1, size), beside).view(*parts.shape[:-1], count, size)
    own = F.one_hot(picks, count).bool()
    own = own.view(*picks.shape, *(1 for _ in range(parts.ndim - 2 - picks.ndim)), count, 1)
    turned = torch.where(own, turned, 0).sum(-2)  # another row's may be infinite
    return x + turned.movedim(0, -2).flatten(-2).movedim(-1, dimension).type_as(x)


def _parts(x: Tensor, rotation: Tensor, dimension: int) -> Any:
    """``[blocks, ..., size]`` in the rotation's dtype."""
    parts = x.type_as(rotation).movedim(dimension, -1)
    return parts.unflatten(-1, rotation.shape[:2]).movedim(-2, 0)  # type: ignore[no-untyped-call]
