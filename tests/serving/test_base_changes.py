"""The base gets other weights under a prepared model, and adapters are made under another default dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import randomise, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import LoraConfig, PromptEncoderConfig


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).eval()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
HEAD = LoraConfig(r=2, lora_alpha=5, target_modules=["0"], modules_to_save=["2"])
BIAS = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], bias="all")
DORA = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], use_dora=True)
LOADS: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "copied": lambda model, new: model.load_state_dict(new, strict=False),
    "assigned": lambda model, new: model.load_state_dict(new, strict=False, assign=True),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("config", [HEAD, BIAS], ids=["head", "bias"])
@torch.no_grad()
def test_slots_take_the_bases_new_weights_when_they_are_loaded(config: LoraConfig, load: str, tmp_path: Path) -> None:
    trained = net(0)
    fxpeft.add_adapter(trained, config)
    randomise(fxpeft.adapter_state_dict(trained).values(), 3)
    fxpeft.save_adapter(trained, tmp_path)
    model, other = net(0), net(5)
    fxpeft.prepare_hotswap(model, 4, targets=["0", "2"], modules_to_save=config.modules_to_save or (), bias=config.bias)
    LOADS[load](model, other.state_dict())
    wanted = other(X)
    torch.testing.assert_close(model(X), wanted)
    fxpeft.load_adapter(model, tmp_path)
    with fxpeft.disabled(model):
        torch.testing.assert_close(model(X), wanted)
    fxpeft.load_adapter(other, tmp_path)
    torch.testing.assert_close(model(X), other(X))
    fxpeft.remove(model)
    assert not model._load_state_dict_post_hooks


@torch.no_grad()
def test_weights_that_are_written_in_place_are_seen_at_the_next_swap() -> None:
    model, other = net(0), net(5)
    fxpeft.prepare_hotswap(model, 4, targets=["0", "2"], modules_to_save=["2"])
    for key, value in other.state_dict().items():
        model.state_dict()[key].copy_(value)
    fxpeft.disable_adapters(model)
    torch.testing.assert_close(model(X), other(X))


WAYS: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    **LOADS,
    "emptied": lambda model, new: (model.to_empty(device="cpu"), model.load_state_dict(new, strict=False)),
    "meta, emptied": lambda model, new: (
        model.to("meta").to_empty(device="cpu"), model.load_state_dict(new, strict=False)),
    "meta, assigned": lambda model, new: model.to("meta").load_state_dict(new, strict=False, assign=True),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [HEAD, BIAS, DORA], ids=["head", "bias", "dora"])
@torch.no_grad()
def test_a_base_that_gets_other_weights_serves_its_adapter(config: LoraConfig, way: str, tmp_path: Path) -> None:
    trained = net(0)
    fxpeft.add_adapter(trained, config)
    randomise(fxpeft.adapter_state_dict(trained).values(), 3)
    fxpeft.save_adapter(trained, tmp_path)
    fresh = net(5)
    weights = fresh.state_dict()
    fxpeft.load_adapter(fresh, tmp_path)
    model = net(0)
    fxpeft.prepare_hotswap(
        model, 4, targets=["0", "2"], modules_to_save=config.modules_to_save or (), bias=config.bias,
        methods=("dora",) if config.use_dora else ("lora",),
    )  # fmt: skip
    fxpeft.load_adapter(model, tmp_path, "a")
    WAYS[way](model, weights)
    torch.testing.assert_close(model(X), fresh(X))
    with fxpeft.disabled(model):
        torch.testing.assert_close(model(X), net(5)(X))
    fxpeft.hotswap(model, tmp_path, "a")
    torch.testing.assert_close(model(X), fresh(X))


def test_no_dtype_is_the_default_ones() -> None:
    prompted = tiny_llama()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fxpeft.add_adapter(prompted, PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5))
        prompts = {name: p.dtype for name, p in prompted.named_parameters() if p.requires_grad}
        model = net(0).float()
        fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
        live = {name: b.dtype for name, b in model.named_buffers()}
        fxpeft.prepare_hotswap(model, 4, targets=["0", "2"], methods=("lora", "dora"))
        slots = {name: b.dtype for name, b in model.named_buffers()}
    finally:
        torch.set_default_dtype(default)
    assert live
    assert slots
    assert prompts
    assert {*live.values(), *slots.values(), *prompts.values()} == {torch.float32}
