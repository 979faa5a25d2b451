"""A head whose weight others read: the active copy where an adapter brings it whole, refused where one changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import randomise, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig

FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]}


class Fused(nn.Module):
    """A loss that multiplies by the head's weight, as TRL's and Liger's do, and never calls the head."""

    def __init__(self, model: Any, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of ``ids``."""
        hidden = self.model.base_model(ids).last_hidden_state
        head = self.model.get_output_embeddings()
        weight = self.read(head)
        return hidden.to(head.weight.device, head.weight.dtype) @ weight.t()


def taken(head: Any) -> Tensor:
    """As TRL has it: the weight with its bias."""
    weight, _bias = head.weight, head.bias
    return weight  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "read", [taken, lambda head: head.weight.float(), lambda head: getattr(head, "weight")],  # noqa: B009
    ids=["taken", "method", "getattr"],
)  # fmt: skip
def test_an_adapted_head_is_refused_where_it_is_read(read: Callable[[Any], Tensor]) -> None:
    model, ids = tiny_llama(), token_ids()
    expected = Fused(model, read)(ids)
    fxpeft.add_adapter(model, LoraConfig(**FIELDS))
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    for _ in range(50):
        with pytest.raises(AdapterError, match=r"^lm_head: .*test_weights_read_past, line \d+.*modules_to_save"):
            Fused(model, read)(ids)
    with fxpeft.disabled(model):  # as the reference of DPO
        assert torch.equal(Fused(model, read)(ids), expected)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.adapters.default.lora_A.grad is not None


def test_who_may_read_an_adapted_head() -> None:
    model, ids = tiny_gpt2(), token_ids()  # whose head is tied
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["lm_head"]))
    base = model.transformer.wte.weight
    assert model.lm_head.weight is base  # outside of a call: tying, initialising, quantising, printing
    model.tie_weights()
    assert model.get_parameter("lm_head.weight") is base
    model.load_state_dict(model.state_dict())

    class Asks(nn.Module):
        """What a forward may ask of a weight."""

        def forward(self, model: Any) -> tuple[Any, ...]:
            """Its dtype and the like."""
            head = model.lm_head
            assert hasattr(head, "weight")
            return head.weight.dtype, head.weight.device, head.weight.shape, head.weight.size(0), head.bias

    for _ in range(50):  # the interpreter reads otherwise what it reads often
        assert Asks()(model)[0] == torch.float32
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    expected = model(ids).logits
    fxpeft.remove(model)
    model.lm_head.forward = lambda x: x @ model.lm_head.weight.t()  # somebody's own forward of the head reads it
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["lm_head"]))
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_head_in_slots() -> None:
    model, ids = tiny_llama(), token_ids()
    fused = Fused(model, taken)
    expected = fused(ids)
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "lm_head", "v_proj"])
    assert torch.equal(fused(ids), expected)
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["v_proj"]))
    fused(ids)
    fxpeft.add_adapter(model, LoraConfig(**FIELDS), "head")
    with pytest.raises(AdapterError, match=r"^lm_head: taken"):
        fused(ids)
    fxpeft.release_hotswap(model)
    with pytest.raises(AdapterError, match=r"^lm_head: taken"):
        fused(ids)
    fxpeft.set_adapter(model, "default")
    fused(ids)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("slots", [False, True])
def test_a_head_that_an_adapter_brings_whole(slots: bool, hooked: bool) -> None:
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    theirs: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    model, ids = tiny_llama(), token_ids()
    fxpeft.add_adapter(model, LoraConfig(**fields))
    if hooked:  # as a device_map does
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
        fxpeft.set_adapter(model, "default")
    for each in (model, theirs):
        randomise((p for p in each.parameters() if p.requires_grad), 1)
    found, expected = Fused(model, taken)(ids), Fused(theirs.get_base_model(), taken)(ids)
    torch.testing.assert_close(found, expected)
    for each in (found, expected):
        each.square().mean().backward()
    theirs_grad = theirs.get_base_model().lm_head.modules_to_save.default.weight.grad
    torch.testing.assert_close(model.lm_head.adapters.default.weight.grad, theirs_grad)
    if slots:
        fxpeft.prepare_hotswap(model, 8)
        torch.testing.assert_close(Fused(model, taken)(ids), expected)
        with fxpeft.disabled(model):
            torch.testing.assert_close(Fused(model, taken)(ids), Fused(tiny_llama(), taken)(ids))
