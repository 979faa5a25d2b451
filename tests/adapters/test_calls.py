"""Adapters named for each row of a call are refused by slots without lanes: ``**kwargs`` would swallow them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig

CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"])


def adapted() -> nn.Module:
    model = tiny_llama()
    fxpeft.add_adapter(model, CONFIG, "a")
    randomise(fxpeft.adapter_state_dict(model).values())
    return model


def prepared() -> nn.Module:
    model = adapted()
    fxpeft.prepare_hotswap(model, 8)
    return model


def empty() -> nn.Module:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj"])
    return model


@pytest.mark.parametrize("make", [prepared, empty])
def test_adapters_for_rows_are_refused(make: Callable[[], Any]) -> None:
    model, ids = make(), token_ids()
    expected = model(ids).logits
    for call in (model, copy.deepcopy(model), torch.compile(model, backend="eager")):
        for _ in range(2):  # and again: nothing is left held
            with pytest.raises(AdapterError, match=r"adapter_names=\['a', 'a'\].*set_adapter\(model, name\)"):
                call(ids, adapter_names=["a", "a"])
        assert torch.equal(call(ids, adapter_names=None).logits, expected)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(ids, adapter_names=["a", "a"], max_new_tokens=2)
    fxpeft.add_adapter(model, CONFIG, "b")  # a swap gets its turn
    fxpeft.remove(model)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    model(ids, adapter_names=["a", "a"])  # the bare model is Transformers' own again


def test_a_forward_with_such_a_parameter_gets_it() -> None:
    class Own(nn.Module):
        """Its forward has rows of its own to name."""

        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 5)

        def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
            """Takes ``[..., 6]``."""
            return self.proj(x) * len(adapter_names or "")  # type: ignore[no-any-return]

    model = Own()
    fxpeft.add_adapter(model, LoraConfig(target_modules=["proj"]))
    x = torch.ones(1, 6)
    assert torch.equal(model(x, adapter_names=["a", "b"]), model.proj(x) * 2)


def test_the_check_of_calls_is_nothing_that_dynamo_compiles() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.up(x))

    class Two(One):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.up(x))

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for cls in (One, Two):  # a hook that is compiled has a guard on the class of its model
            model = cls().eval()
            fxpeft.prepare_hotswap(model, 4, targets=["up"])
            torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 5))
