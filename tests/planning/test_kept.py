"""What the plan says that training keeps for the backward pass is what autograd then keeps."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from adapter_files import add
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import IA3Config, LoraConfig, Plan

TOKENS = 7  # no other size of the model
SITES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": SITES, "rank_pattern": {"up_proj": 5}}
CONFIGS: dict[str, Any] = {
    "LoRA": LoraConfig(**LORA),
    "dropout": LoraConfig(**LORA, lora_dropout=0.3),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "DoRA, dropout": LoraConfig(**LORA, use_dora=True, lora_dropout=0.3),
    "AdaLoRA": fxpeft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=SITES),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "some": LoraConfig(r=3, target_modules=["k_proj", "v_proj"], layers_to_transform=[1]),
}


def kept(model: nn.Module) -> int:
    """Bytes of what autograd keeps of tokens."""
    found: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        if TOKENS in tensor.shape:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # so that no later one has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.arange(TOKENS)[None], use_cache=False)
    return sum(found.values())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    """Traced once for all plans."""
    model = tiny_llama(request.param).requires_grad_(False)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_is_what_autograd_keeps(name: str, model: Any) -> None:
    config = copy.deepcopy(CONFIGS[name])
    bare, plan = kept(model.train()), fxpeft.plan(model, config)
    add(model, config)
    found = kept(model.train())
    fxpeft.remove(model)
    assert found - bare == TOKENS * plan.kept


def test_an_input_is_counted_at_its_first_site(model: Any) -> None:
    model = model.float()
    plan = fxpeft.plan(model, LoraConfig(**LORA))
    layer = {s.name.removeprefix("model.layers.1."): s for s in plan.sites if ".1." in s.name}
    assert {name: s.input_of.removeprefix("model.layers.1.") for name, s in layer.items() if s.input_of} == {
        "self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj",
    }  # fmt: skip
    assert (layer["self_attn.q_proj"].kept_here, layer["self_attn.k_proj"].kept_here) == (4 * (32 + 3), 4 * 3)
    assert f"{plan.kept / 1000:.3g}k" in str(plan)
    # where the model isn't traced each counts its own
    apart = fxpeft.plan(model, LoraConfig(**LORA), roles=False)
    assert apart.kept == plan.kept + 2 * 4 * 3 * 32
    assert fxpeft.plan(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn", "wte"])).sites[0].kept_here == 8 + 2 * 4


def test_a_plan_of_an_older_json_says_nothing_of_it() -> None:
    plan = fxpeft.plan(tiny_llama(), LoraConfig(**LORA), roles=False)
    content = json.loads(plan.to_json())
    for site in content["sites"]:
        for name in ("kept", "kept_input", "input_of", "update"):
            del site[name]
    old = Plan.from_json(json.dumps(content))
    assert old.kept == 0
    assert old.parameters == plan.parameters
