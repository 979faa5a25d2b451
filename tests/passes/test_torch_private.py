"""Canaries: each private API of torch that fxpeft uses still does what it is used for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from fxpeft.passes.torch_private import checkpoint_above, in_backward, skip_frame


def test_a_skipped_frame_runs_and_dynamo_begins_with_what_it_calls() -> None:
    ran = []

    def inner(x: Tensor) -> Tensor:
        return x * 2

    def note() -> None:
        ran.append(torch.compiler.is_dynamo_compiling())

    def outer(x: Tensor) -> Tensor:
        note()
        return inner(x)

    skip_frame(outer)
    skip_frame(note, deep=True)
    counter = CompileCounter()
    compiled = torch.compile(outer, backend=counter, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert ran == [False, False]
    assert counter.frame_count == 1


def test_a_backward_knows_that_it_is_one() -> None:
    seen = [in_backward()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(in_backward()))
    x.sum().backward()
    assert seen == [False, True]


def test_a_reentrant_checkpoint_shows_its_context_in_forward_and_backward() -> None:
    found = []

    def watch() -> None:
        found.append(checkpoint_above(test_a_backward_knows_that_it_is_one.__code__))

    def part(x: Tensor) -> Tensor:
        (lambda: watch())()
        return x * x

    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=True).sum().backward()
    (context, forward), (again, backward) = found
    assert context is again
    assert (forward, backward) == (False, True)
    part(x)
    assert found[2] is None
