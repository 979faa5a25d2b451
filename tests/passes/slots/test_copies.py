"""Copies that are prepared once: whatever the memory looks like, every value is there, and a backward notices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.room import at


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


def rows(count: int, step: int, start: int, shape: tuple[int, ...], *, seed: int | None) -> list[Tensor]:
    """Tensors at equal steps in one piece of memory, of zeros without a seed."""
    memory = torch.zeros(start + count * step + 64) if seed is None else numbers(start + count * step + 64, seed=seed)
    strides = [1] if len(shape) == 1 else [shape[1], 1]
    return [at(memory, start + i * step, shape, strides) for i in range(count)]


def test_what_lies_in_equal_steps_is_one_copy() -> None:
    to, source = rows(5, 64, 3, (3, 7), seed=None), rows(5, 21, 0, (3, 7), seed=1)
    copies = Copies(zip(to, source, strict=True))
    assert len(copies.others) == 1
    assert not copies.moves
    versions = [t._version for t in to]
    copies.run()
    assert all(torch.equal(t, s) for t, s in zip(to, source, strict=True))
    assert all(t._version > version for t, version in zip(to, versions, strict=True))
    assert not at(to[0], 3 + 21, (43,), (1,)).any()  # what lies between


@pytest.mark.parametrize("left_out", [0, 2, 4])
def test_gaps_other_steps_and_shapes_part_the_runs(left_out: int) -> None:
    to, source = rows(6, 40, 0, (4, 5), seed=None), rows(6, 20, 0, (4, 5), seed=1)
    more, given = rows(3, 30, 0, (9,), seed=None), rows(3, 9, 0, (9,), seed=2)
    pairs = [*zip(to, source, strict=True), *zip(more, reversed(given), strict=True)]
    kept = [pair for number, pair in enumerate(pairs) if number != left_out]
    copies = Copies(kept)
    assert len(copies.others) + len(copies.moves) <= 6
    copies.run()
    assert all(torch.equal(t, s) for t, s in kept)
    assert not to[left_out].any()


def test_a_cast_of_many_is_one_copy() -> None:
    memory = torch.zeros(200, dtype=torch.bfloat16)
    to, source = [at(memory, 40 * i, (4, 5), (5, 1)) for i in range(5)], rows(5, 20, 0, (4, 5), seed=1)
    copies = Copies(zip(to, source, strict=True))
    assert len(copies.others) == 1
    copies.run()
    assert all(torch.equal(t, s.bfloat16()) for t, s in zip(to, source, strict=True))


def test_one_source_for_all() -> None:
    to = rows(4, 30, 0, (9,), seed=None)
    source = numbers(9)
    Copies((t, source) for t in to).run()
    assert all(torch.equal(t, source) for t in to)
