"""The tolerance of all tests: rounding passes, a wrong scale, a dropped bias and a swapped factor don't."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close, is_close, tolerance
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def low_rank(dtype: torch.dtype, width: int, *, scale: float = 1.75, bias: float = 0.25, split: bool = False) -> Tensor:
    """``W x + scale B A x + bias`` of 7 rows, ``width`` wide; ``split`` adds the halves of each sum apart."""
    generator = torch.Generator().manual_seed(3)
    x, w, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(factor).to(dtype)
        for shape, factor in (((7, width), 1), ((9, width), width**-0.5), ((5, width), width**-0.5), ((9, 5), 0.4))
    )

    def product(left: Tensor, right: Tensor) -> Tensor:
        if not split:
            return left @ right.T
        half = left.shape[-1] // 2
        return left[:, half:] @ right[:, half:].T + left[:, :half] @ right[:, :half].T

    return product(x, w) + product(product(x, a), b) * scale + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [6, 64, 1024, 4096])
def test_sums_in_another_order_are_close(dtype: torch.dtype, width: int) -> None:
    assert_close(low_rank(dtype, width, split=True), low_rank(dtype, width), terms=width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [6, 64, 1024])
@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"scale": 3.5}, {"scale": -1.75}, {"scale": 0.0}, {"bias": 0.0}])
def test_a_wrong_scale_and_a_dropped_bias_are_not(dtype: torch.dtype, width: int, wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match=r"a hint.*not close"):
        assert_close(low_rank(dtype, width, **wrong), low_rank(dtype, width), terms=width, message="a hint: ")
    assert not is_close(low_rank(dtype, width, **wrong), low_rank(dtype, width), terms=width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_scale_wrong_by_a_thousandth_is_not_whatever_the_size(dtype: torch.dtype, size: float) -> None:
    wanted = low_rank(dtype, 64) * size
    assert_close(low_rank(dtype, 64, split=True) * size, wanted)
    assert not is_close(wanted * 1.001, wanted)
    assert not is_close(low_rank(dtype, 64, scale=1.752) * size, wanted)


def test_a_swapped_factor_a_dtype_and_a_shape_are_not() -> None:
    wanted = low_rank(torch.float32, 9)
    assert not is_close(wanted.flip(1), wanted)
    assert not is_close(wanted.double(), wanted)
    assert not is_close(wanted[:, :1], wanted)


def test_what_is_not_a_number_has_to_be_the_same() -> None:
    wanted = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert_close(wanted + 1e-6, wanted)
    for wrong in ([1.001, torch.nan, torch.inf, -torch.inf], [1.0, 0.0, torch.inf, -torch.inf], [1.0, torch.nan, 3, 4]):
        assert not is_close(torch.tensor(wrong), wanted)


def test_zeros_are_exact_unless_the_summands_size_is_said() -> None:
    zeros = torch.zeros(3)
    assert_close(zeros.clone(), zeros)
    assert not is_close(zeros + 1e-30, zeros)
    assert_close(zeros + 1e-6, zeros, size=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_terms_means_to_the_bit(dtype: torch.dtype) -> None:
    wanted = low_rank(dtype, 9)
    assert_close(wanted.clone(), wanted, terms=0)
    assert not is_close(wanted * (1 + torch.finfo(dtype).eps), wanted, terms=0)


def test_longer_sums_and_coarser_dtypes_may_differ_by_more() -> None:
    assert tolerance(torch.float32, terms=1) < 1e-6 < tolerance(torch.float32) < 1e-5
    assert tolerance(torch.float32, terms=64) < tolerance(torch.float32, terms=65)
    assert tolerance(torch.float64) < tolerance(torch.float32) < tolerance(torch.float16) < tolerance(torch.bfloat16)
    assert tolerance(torch.bfloat16, terms=4096) < 0.02
