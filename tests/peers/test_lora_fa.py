"""PEFT's LoRA-FA optimiser on what ``lora_fa_groups`` gives: the steps that it takes on PEFT's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from tiny import randomise, two_linears

import fxpeft


def test_steps_are_pefts(tmp_path: Path) -> None:
    model = two_linears()
    config = fxpeft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], rank_pattern={"2": 2}, use_rslora=True)
    fxpeft.add_adapter(model, config)
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    fxpeft.save_adapter(model, tmp_path)
    peer = PeftModel.from_pretrained(two_linears(), str(tmp_path), is_trainable=True)
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(3))
    ours = LoraFAOptimizer(fxpeft.lora_fa_groups(model, 0.01, weight_decay=0.1))
    theirs = create_lorafa_optimizer(peer, 3, 7, 0.01, weight_decay=0.1)
    before = {key: value.clone() for key, value in fxpeft.adapter_state_dict(model).items()}
    for _ in range(3):
        for each, optimiser in ((model, ours), (peer, theirs)):
            each(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    own, wanted = fxpeft.adapter_state_dict(model), dict(peer.named_parameters())
    for key, value in own.items():
        torch.testing.assert_close(value, wanted[key.replace(".weight", ".default.weight")], rtol=1e-3, atol=1e-4)
        assert torch.equal(value, before[key]) is ("lora_A" in key)


def test_what_is_no_lora_is_refused() -> None:
    model = two_linears()
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(fxpeft.AdapterError, match="default has no A and B"):
        fxpeft.lora_fa_groups(model, 0.01)
    with fxpeft.disabled(model), pytest.raises(fxpeft.AdapterError, match="no parameter is trained"):
        fxpeft.lora_fa_groups(model, 0.01)
