"""How near two results of the same mathematics have to be: from their dtype and the length of their sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
LONGEST = 64  # no sum in the tiny models is longer


def tolerance(dtype: torch.dtype, *, terms: int = LONGEST) -> float:
    """What rounding may make of a sum, as a part of the largest value.

    Args:
        dtype: Of the result. Products of a half are summed in float32, and the result is rounded once or twice.
        terms: How many summands the two sides may add in another order; 1 where both add them in the same.
    """
    summed = torch.finfo(torch.float32 if dtype in HALVES else dtype).eps
    rounded = 2 * torch.finfo(dtype).eps if dtype in HALVES else 0.0
    return 8 * summed * math.sqrt(terms) + rounded


def allowed(wanted: Tensor, *, terms: int = LONGEST, size: float | None = None) -> float:
    """How far a value may be from ``wanted``'s.

    Args:
        wanted: What is right.
        terms: As above; 0 where the same numbers are wanted, to the bit.
        size: Of the largest summand, where they cancel; ``wanted``'s largest finite value otherwise.
    """
    if not terms:
        return 0.0
    if size is None:
        finite = wanted.detach()[wanted.detach().isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
    return tolerance(wanted.dtype, terms=terms) * size


def assert_close(
    found: Tensor, wanted: Tensor, *, terms: int = LONGEST, size: float | None = None, message: str = ""
) -> None:
    """Of one shape and dtype, NaN and infinities in the same places, and equal to within what rounding explains."""
    atol = allowed(wanted, terms=terms, size=size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol, equal_nan=True, msg=lambda text: f"{message}{text}")


def is_close(found: Tensor, wanted: Tensor, *, terms: int = LONGEST, size: float | None = None) -> bool:
    """Whether :func:`assert_close` passes."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    atol = allowed(wanted, terms=terms, size=size)
    return torch.allclose(found, wanted, rtol=0, atol=atol, equal_nan=True)
