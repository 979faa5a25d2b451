"""Contexts on a prepared model that Inductor compiled: nothing compiles again, inside or after."""

from __future__ import annotations

import contextlib
from typing import Literal

import pytest
import torch
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor

import fxpeft
from fxpeft import LoraConfig
from fxpeft.testing import no_recompiles

IDS = token_ids()
CONFIGS = {
    "a": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}),
    "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "d": LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj"], use_dora=True),
}


@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_no_context_recompiles(rank: Literal["dynamic", "static"]) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 16, methods=("lora", "dora"), rank=rank)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        source = tiny_llama()
        fxpeft.add_adapter(source, config)
        randomise(fxpeft.adapter_state_dict(source).values(), seed)
        fxpeft.inject(model, fxpeft.adapter_state_dict(source), config, name)
    fxpeft.set_adapter(model, ["b", "a"])
    compiled = torch.compile(model, fullgraph=True)

    @torch.no_grad()
    def check(expected: Tensor | None = None) -> Tensor:
        found: Tensor = compiled(IDS).logits
        wanted = model(IDS).logits if expected is None else expected
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        return found

    with no_recompiles() as counted:
        both = check()
        with fxpeft.active(model, "d"):
            gained = check()
            with fxpeft.scaled(model, "d", 0.5), fxpeft.folded(model):
                assert not torch.equal(check(), gained)
            check(gained)
            with fxpeft.folded(model):
                check(gained)
                with fxpeft.folded(model, ["a", "b"]):
                    check(both)
            with fxpeft.disabled(model):
                bare = check(tiny_llama()(IDS).logits)
        check(both)
        with fxpeft.scaled(model, {"a": 0, "b": 0}):
            check(bare)
        with contextlib.suppress(ZeroDivisionError), fxpeft.active(model, []):
            check(bare)
            raise ZeroDivisionError
        check(both)
    assert counted.graphs == 1
