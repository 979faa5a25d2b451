"""Dropout as PEFT draws it: the same mask from the same seed, of the input in the adapter's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import randomise, two_linears

import fxpeft
from fxpeft.methods.config import AdapterConfig

COMMON: dict[str, Any] = {"lora_alpha": 7, "lora_dropout": 0.4, "target_modules": ["2"]}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": fxpeft.LoraConfig(r=3, **COMMON),
    "dora": fxpeft.LoraConfig(r=3, use_dora=True, **COMMON),
    "adalora": fxpeft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **COMMON),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_mask_and_the_values_are_pefts_on_a_half_precision_base(method: str, tmp_path: Path) -> None:
    model, theirs = (two_linears().to(torch.bfloat16) for _ in range(2))
    fxpeft.add_adapter(model, CONFIGS[method])
    randomise((p for key, p in fxpeft.adapter_state_dict(model).items() if "magnitude" not in key), 1)
    fxpeft.save_adapter(model, tmp_path)
    peer = PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True).train()
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found = []
    for each in (model.train(), peer):
        torch.manual_seed(11)
        out = each(x)
        (out.float() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()  # as rounded on both sides
        found.append((out, [p.grad for n, p in each.named_parameters() if "lora_A" in n]))
    assert all(p.dtype is torch.float32 for p in fxpeft.adapter_state_dict(model).values())
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-2)
    (own,), (other,) = found[0][1], found[1][1]
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
