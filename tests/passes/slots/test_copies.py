"""Copies that are prepared once: whatever the memory looks like, every value is there, and a backward notices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpeft.passes.slots.copies import Copies


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(case: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A target of zeros and a source of the same shape."""
    source = numbers(5, 7, seed=seed)
    if case == "plain":
        return torch.zeros(5, 7), source
    if case == "transposed source":
        return torch.zeros(5, 7), numbers(7, 5, seed=seed).T
    if case == "transposed target":
        return torch.zeros(7, 5).T, source
    if case == "another dtype":
        return torch.zeros(5, 7, dtype=torch.bfloat16), source
    if case == "a window":
        return torch.zeros(9, 7)[2:7], source
    if case == "columns":
        return torch.zeros(5, 9)[:, 1:8], source
    if case == "broadcast":
        return torch.zeros(5, 7), source[:, :1].expand(5, 7)
    if case == "parameter":
        return torch.zeros(5, 7), nn.Parameter(source)
    assert case == "empty"
    return torch.zeros(0, 7), source[:0]


CASES = [
    "plain", "transposed source", "transposed target", "another dtype", "a window", "columns", "broadcast",
    "parameter", "empty",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_value_arrives_as_often_as_wanted(case: str) -> None:
    to, source = pair(case)
    copies = Copies([(to, source)])
    for number in range(2):
        with torch.no_grad():
            source.copy_(numbers(*source.shape, seed=number)) if case not in ("broadcast", "parameter") else None
            to.zero_()
        copies.run()
        assert torch.equal(to, source.detach().to(to.dtype))


@pytest.mark.parametrize("threads", [1, 3])
def test_many_at_once(threads: int) -> None:
    """From 32 that are no plain bytes on, threads share them."""
    before = torch.get_num_threads()
    pairs = [pair(case, seed) for seed in range(20) for case in CASES]
    torch.set_num_threads(threads)
    try:
        Copies(pairs).run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(to, source.detach().to(to.dtype)) for to, source in pairs)
    assert sum(float(to.float().abs().sum()) > 1 for to, _ in pairs) == len(pairs) - 20  # all but the empty ones


def test_neighbours_are_left_alone() -> None:
    memory = torch.zeros(9, 7)
    Copies([(memory[2:7], numbers(5, 7))]).run()
    assert not memory[:2].any()
    assert not memory[7:].any()


@pytest.mark.parametrize("moved", ["source", "target"])
def test_memory_that_moved_is_found(moved: str) -> None:
    to, source = pair("plain")
    copies = Copies([(to, source)])
    copies.run()
    tensor = to if moved == "target" else source
    old = tensor.data
    tensor.data = numbers(5, 7, seed=8)
    old.fill_(99.0)
    wanted = source.clone()
    copies.run()
    assert torch.equal(to, wanted)
    assert moved == "source" or bool((old == 99.0).all())  # what it was is written by nobody


@pytest.mark.parametrize("case", ["plain", "transposed source"])
def test_a_backward_that_saved_the_old_values_says_so(case: str) -> None:
    to, source = pair(case)
    x = numbers(5, 7, seed=2).requires_grad_()
    y = (x * to).sum()
    Copies([(to, source)]).run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    before = torch.get_num_threads()
    pairs = [pair("transposed source", seed) for seed in range(40)]
    copies = Copies([*pairs, (torch.zeros(2, 3).T, numbers(4, 3))])
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError):
            copies.run()
    finally:
        torch.set_num_threads(before)
