"""Merging task vectors: plain functions of tensors, one stack ``[adapters, ...]`` in, one tensor out.

TIES: https://arxiv.org/abs/2306.01708. DARE: https://arxiv.org/abs/2311.03099. The rules are those of
PEFT's ``utils/merge_utils.py``, so that the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Sign = Literal["total", "frequency"]
PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


def merge(
    rule: str,
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign_method: Sign = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Merge vectors of one shape: prune each, elect signs, and add them up with their weights, as the rule says."""
    if density is not None and density < 1 and rule in PRUNING:
        if rule.startswith("dare"):
            vectors = [drop_and_rescale(v, density, generator) for v in vectors]
        else:
            vectors = [keep_largest(v, density) for v in vectors]
    stack = torch.stack(list(vectors))
    factors = torch.tensor(weights, device=stack.device, dtype=stack.dtype)
    weighted = stack * factors.view(-1, *(1 for _ in stack.shape[1:]))
    if rule.endswith("ties"):
        return disjoint_mean(weighted, majority_sign(stack, majority_sign_method))
    return weighted.sum(0)


def keep_largest(vector: Tensor, density: float) -> Tensor:
    """Zero all but this share of the entries, the ones with the largest magnitude."""
    mask = torch.zeros_like(vector).reshape(-1)
    mask[vector.abs().reshape(-1).topk(int(density * vector.numel())).indices] = 1
    return vector * mask.reshape(vector.shape)


def drop_and_rescale(vector: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep each entry with this probability, divided by it: the expected value stays."""
    return vector * torch.bernoulli(torch.full_like(vector, density), generator=generator) / density


def majority_sign(stack: Tensor, method: Sign = "total") -> Tensor:
    """Which entries have their position's elected sign: the sum's, or the one that more vectors have."""
    sign = stack.sign()
    votes = (stack if method == "total" else sign).sum(0)
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_mean(stack: Tensor, mask: Tensor) -> Tensor:
    """The mean over the entries of the mask, position by position; zero where there are none."""
    return (stack * mask).sum(0) / mask.sum(0).clamp(min=1)
