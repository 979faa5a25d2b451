"""FSDP2 (``fully_shard``) around adapters, in two processes: beside one process that sees both halves of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_llama, token_ids, two_linears
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_outputs import CausalLMOutput
from two_processes import in_two_processes

import fxpeft

STEPS = 4
ADALORA = {"init_r": 3, "target_r": 2, "total_step": STEPS, "tinit": 1, "tfinal": 1, "lora_alpha": 7}


class WithLoss(nn.Module):
    """What adds a term to a loss needs an output that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_linears()

    def forward(self, x: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=self.body(x).square().mean())


def adapted() -> WithLoss:
    model = WithLoss().train()
    fxpeft.add_adapter(model, fxpeft.AdaLoraConfig(target_modules=["0", "2"], **ADALORA))
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    return model


def trained(model: WithLoss, own: slice) -> dict[str, Tensor]:
    data = torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(3))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    allocator = fxpeft.RankAllocator(model)
    for step in range(STEPS):
        model(data[step, own]).loss.backward()
        optimiser.step()
        allocator.update(step + 1)
        optimiser.zero_grad()
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in whole.items()}


def in_parts(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = adapted()
    for part in (model.body[0], model.body[2], model):
        fully_shard(part)
    found["adalora"] = trained(model, slice(4 * rank, 4 * rank + 4))
    found["ranks"] = fxpeft.adapter_config(model).rank_pattern

    kinds = []
    for verb in (lambda m: None, fxpeft.disable_adapters, fxpeft.enable_adapters, fxpeft.remove):
        verb(model)
        kinds.append([isinstance(m, FSDPModule) for m in (model.body[0], model.body[1], model.body[2], model)])
        model(torch.ones(2, 5))
    found["kinds"], found["class"] = kinds, type(model.body[0]).__name__

    prompted = tiny_llama()
    fxpeft.add_adapter(prompted, fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    fully_shard(prompted)
    fxpeft.disable_adapters(prompted)
    found["prompt"] = [isinstance(prompted, FSDPModule), type(prompted).__name__]
    found["logits"] = prompted(token_ids()).logits.detach()

    fxpeft.install()
    whole = tiny_llama()
    fxpeft.add_adapter(whole, fxpeft.LoraConfig(r=3, lora_alpha=7))
    randomise(fxpeft.adapter_state_dict(whole).values(), 2)
    for layer in whole.model.layers:
        fully_shard(layer)
    fully_shard(whole)
    # what accelerate's get_state_dict gives: everything to the first process, nothing to the others
    state = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    found["state"] = len(state)
    whole.save_pretrained(folder / "saved", is_main_process=rank == 0, state_dict=state)
    return found


@pytest.mark.slow
def test_two_processes_with_fsdp2(tmp_path: Path) -> None:
    wanted_model = adapted()
    wanted = trained(wanted_model, slice(0, 8))
    results = in_two_processes(in_parts, tmp_path, tmp_path)
    for found in results:
        assert found["adalora"].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found["adalora"][name], value, rtol=1e-4, atol=1e-5)
        assert found["ranks"] == fxpeft.adapter_config(wanted_model).rank_pattern
        assert found["kinds"] == [[True, False, True, True]] * 4
        assert found["class"] == "FSDPLinear"
        assert found["prompt"] == [True, "FSDPLlamaForCausalLM"]
        torch.testing.assert_close(found["logits"], tiny_llama()(token_ids()).logits.detach())
    assert [bool(found["state"]) for found in results] == [True, False]
    one, other = tiny_llama(), tiny_llama()
    fxpeft.add_adapter(one, fxpeft.LoraConfig(r=3, lora_alpha=7))
    randomise(fxpeft.adapter_state_dict(one).values(), 2)
    fxpeft.load_adapter(other, tmp_path / "saved")
    torch.testing.assert_close(other(token_ids()).logits, one(token_ids()).logits)
