"""A function of torch's that somebody replaced is the operation that it replaces, in modules and in adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import randomise, two_linears
from torch import Tensor, nn

import fxpeft

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
CALLS: list[int] = []


class Released(torch.autograd.Function):
    """A linear that looks at its tensors, as DeepSpeed's for ZeRO-3 does."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.biased = bias is not None
        CALLS.append(1)
        if input.dim() == 2 and bias is not None:
            return torch.addmm(bias, input, weight.t())
        out = input.matmul(weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        flat, rows = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        grads = (grad.matmul(weight), flat.t().matmul(rows))
        return (*grads, flat.sum(0)) if ctx.biased else grads


def released_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With the signature of DeepSpeed's ``zero3_linear_wrap``."""
    return Released.apply(input, weight) if bias is None else Released.apply(input, weight, bias)


def replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "linear", released_linear)


class Scaled(nn.Linear):
    """No stock forward: only in its graph it is a linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


def lora(**fields: Any) -> Callable[[nn.Module], None]:
    config = fxpeft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], rank_pattern={"2": 2}, **fields)
    return lambda model: fxpeft.add_adapter(model, config)


def slots(model: nn.Module) -> None:
    lora()(model)
    fxpeft.prepare_hotswap(model, 8)


@pytest.mark.parametrize("way", ["lora", "dropout", "dora", "slots"])
@pytest.mark.parametrize("patched", ["before", "after"])
def test_adapters_under_a_replaced_linear(way: str, patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"lora": lora(), "dropout": lora(lora_dropout=0.3), "dora": lora(use_dora=True), "slots": slots}
    found = []
    for number in range(2):
        model = two_linears()
        model[2] = Scaled(7, 3)
        model.load_state_dict(two_linears().state_dict())
        if number == 1 and patched == "before":
            replaced(monkeypatch)
        ways[way](model)
        if number == 1 and patched == "after":
            replaced(monkeypatch)
        if way != "slots":
            randomise(fxpeft.adapter_state_dict(model).values(), 1)
        else:
            tensors = {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}
            randomise(tensors.values(), 1)
            fxpeft.load_adapter_state_dict(model, tensors)
        CALLS.clear()
        torch.manual_seed(4)
        out = model.train()(X)
        if way != "slots":
            out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert F.linear is released_linear
    assert len(CALLS) >= 2 or patched == "after"  # what was traced before calls what was there then
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
