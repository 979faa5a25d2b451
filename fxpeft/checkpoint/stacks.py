"""Stacks of experts in files of PEFT 0.17 and 0.18, which had A and B the other way round.

There A met the first dimension of every matrix of a stack; since 0.19 it meets the input, which is the second unless
the module says ``is_transposed``. PEFT refuses the old files since then, or misreads them where a stack is square.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fxpeft.checkpoint.reading import minor_of
from fxpeft.passes.targets.operations import ParameterKind


def has_old(kind: ParameterKind, rank: int, a: Tensor, b: Tensor, release: str | None) -> bool:
    """Whether A and B are as PEFT 0.17 and 0.18 laid them out: by their shapes, else by the release.

    Args:
        release: what wrote the file, as far as that says so: PEFT 0.17 didn't, so its square stacks are read as
            those of today.
    """
    if kind.experts is None or kind.transposed:
        return False
    shapes = tuple(a.shape), tuple(b.shape)
    before = _before(kind)
    if shapes != (before.a_shape(rank), before.b_shape(rank)):
        return False
    named = minor_of(release)
    return kind.in_features != kind.out_features or (named is not None and named < 19)


def from_old(kind: ParameterKind, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[rank * experts, in]`` and B ``[out, rank * experts]`` of a stack, from the old ones."""
    before = _before(kind)
    ranks, rows = before.ranks(a), before.rows(b)  # [rank, experts, out], [rank, experts, in]
    return kind.unranks(rows).contiguous(), kind.unrows(ranks, len(ranks)).contiguous()


def _before(kind: ParameterKind) -> ParameterKind:
    return replace(kind, in_features=kind.out_features, out_features=kind.in_features)
