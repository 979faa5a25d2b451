"""The base gets other weights under a prepared model, and adapters are made under another default dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft import LoraConfig


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).eval()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
HEAD = LoraConfig(r=2, lora_alpha=5, target_modules=["0"], modules_to_save=["2"])
BIAS = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], bias="all")
LOADS: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "copied": lambda model, new: model.load_state_dict(new, strict=False),
    "assigned": lambda model, new: model.load_state_dict(new, strict=False, assign=True),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("config", [HEAD, BIAS], ids=["head", "bias"])
@torch.no_grad()
def test_slots_take_the_bases_new_weights_at_the_next_swap(config: LoraConfig, load: str, tmp_path: Path) -> None:
    trained = net(0)
    fxpeft.add_adapter(trained, config)
    randomise(fxpeft.adapter_state_dict(trained).values(), 3)
    fxpeft.save_adapter(trained, tmp_path)
    model, other = net(0), net(5)
    fxpeft.prepare_hotswap(model, 4, targets=["0", "2"], modules_to_save=config.modules_to_save or (), bias=config.bias)
    LOADS[load](model, other.state_dict())
    wanted = other(X)
    fxpeft.load_adapter(model, tmp_path)
    with fxpeft.disabled(model):
        torch.testing.assert_close(model(X), wanted)
    fxpeft.load_adapter(other, tmp_path)
    torch.testing.assert_close(model(X), other(X))


def test_no_dtype_is_the_default_ones() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = net(0).float()
        fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
        live = {name: b.dtype for name, b in model.named_buffers()}
        fxpeft.prepare_hotswap(model, 4, targets=["0", "2"], methods=("lora", "dora"))
        slots = {name: b.dtype for name, b in model.named_buffers()}
    finally:
        torch.set_default_dtype(default)
    assert live
    assert slots
    assert {*live.values(), *slots.values()} == {torch.float32}
