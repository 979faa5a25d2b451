"""A stack and its update, told apart: what torch does with it, of which shape what is made, and what needs the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxpeft.passes.live.split import Split, split_product, why_whole

EXPERTS, IN, OUT, RANK = 3, 8, 16, 3  # the grouped product takes rows of a multiple of 16 bytes
PICKS, ENDS = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([2, 2, 5], dtype=torch.int32)


def factors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A stack ``[experts, out, in]`` and its factors."""
    torch.manual_seed(0)
    shapes = (EXPERTS, OUT, IN), (EXPERTS, OUT, RANK), (EXPERTS, RANK, IN)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


# what is done with rows [5, in] and the stack
USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a loop": lambda x, w: torch.cat([F.linear(x[:2], w[0], x.new_ones(OUT)), F.linear(x[2:], w[torch.tensor(2)])]),
    "a loop of products": lambda x, w: torch.cat([x[:2] @ w.transpose(1, 2)[0], x[2:] @ w.transpose(-1, -2)[2]]),
    "cast": lambda x, w: F.linear(x.float(), w[1].float()),
    "a batch": lambda x, w: torch.bmm(w[PICKS], x.unsqueeze(-1)).squeeze(-1),
    "a batch on the right": lambda x, w: torch.bmm(x.unsqueeze(1), w.transpose(1, 2)[PICKS]).squeeze(1),
    "grouped": lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS),
    "its shape": lambda x, w: x @ torch.ones(w.shape[2], w.size(1), dtype=w.dtype) * len(w) * w.ndim,
    "the sum": lambda x, w: torch.einsum("si,eoi->so", x, w),
    "the sum by a method": lambda x, w: x @ w.sum(0).t(),
    "a part by a list": lambda x, w: x @ w[[0, 2]].mean(0).t(),
}
SPLIT = ("a loop", "a loop of products", "cast", "a batch", "a batch on the right", "grouped")


@pytest.mark.parametrize("use", USES)
def test_everything_is_as_with_the_sum(use: str) -> None:
    x, held = torch.randn(5, IN, generator=torch.Generator().manual_seed(1)), factors()
    found = []
    for given in (split_product, lambda weight, left, right: weight + left @ right):
        leaves = [t.clone().requires_grad_() for t in (x, *held)]
        out = USES[use](leaves[0], given(*leaves[1:]))
        grads = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
        found.append([out, *(torch.zeros(()) if g is None else g for g in grads)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("use", SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_make_no_sum_and_factors_are_rounded_as_for_it(
    use: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, (weight, left, right) = torch.randn(5, IN).to(dtype), factors()
    stack = split_product(weight.to(dtype), left, right)
    monkeypatch.setattr(Split, "whole", lambda self: pytest.fail("the sum was made"))
    found = USES[use](x, stack)
    wanted = USES[use](x.float(), weight.to(dtype).float() + left.to(dtype).float() @ right.to(dtype).float())
    assert_close(found.to(dtype), wanted.to(dtype), size=4 * float(wanted.abs().max()))


def test_two_updates_and_one_node_of_a_graph() -> None:
    weight, left, right = factors()
    twice = split_product(split_product(weight, left, right), 2 * left, right)
    wanted = weight + 3 * left @ right
    assert_close(twice.whole(), wanted)
    x = torch.randn(5, IN)
    assert_close(F.linear(x, twice[1]), F.linear(x, wanted[1]))
    assert twice.whole() is twice.whole()
    graph = symbolic_trace(lambda w, a, b: split_product(w, a, b)).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [split_product]
    assert isinstance(twice, Split)


def test_which_forwards_it_is_for() -> None:
    module = nn.Module()
    assert "none of Transformers' for experts" in why_whole(module)
    module.config = type("Config", (), {"_experts_implementation": "grouped_mm"})()
    assert not why_whole(module)
    module.config._experts_implementation = "sonicmoe"
    assert "experts_implementation='sonicmoe' takes the parameter's memory" in why_whole(module)
