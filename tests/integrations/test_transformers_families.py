"""Many architectures through Transformers' methods: add, train, save, load and swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import FAMILIES, Family, first_output
from tiny import randomise
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft


def outputs(model: Any, family: Family) -> Tensor:
    with torch.no_grad():
        return first_output(model(**family.inputs()))


def config(family: Family, *, other: bool = False) -> fxpeft.LoraConfig:
    if other:
        return fxpeft.LoraConfig(
            r=5, lora_alpha=9, target_modules=family.other, target_parameters=family.parameters[-1:] or None
        )
    pattern = {family.targets[0]: 3}
    return fxpeft.LoraConfig(
        r=4, lora_alpha=10, target_modules=family.targets, target_parameters=family.parameters or None,
        rank_pattern=pattern | dict.fromkeys(family.parameters[:1], 2), alpha_pattern={family.targets[1]: 7},
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_add_train_save_load_swap(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    bare = outputs(model, family)
    model.add_adapter(config(family))
    assert torch.equal(outputs(model, family), bare)

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(**family.inputs()).loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
    model.eval()
    trained = outputs(model, family)
    assert not torch.allclose(trained, bare, atol=1e-4)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    # three steps leave B small; larger numbers show a wrong scale better
    randomise(model.get_adapter_state_dict().values(), seed=1)
    first = outputs(model, family)
    own, gathered = model.get_adapter_state_dict(), model.get_adapter_state_dict(state_dict=model.state_dict())
    assert own.keys() == gathered.keys()
    assert all(torch.equal(gathered[key], value) for key, value in own.items())
    model.save_pretrained(tmp_path / "first")
    model.add_adapter(config(family, other=True), "other")
    randomise(model.get_adapter_state_dict("other").values(), seed=2)
    second = outputs(model, family)
    model.save_pretrained(tmp_path / "second")
    assert not torch.allclose(first, second, atol=1e-2)
    model.delete_adapter(["default", "other"])
    assert torch.equal(outputs(model, family), bare)

    fresh = family.build()
    info = fresh.load_adapter(str(tmp_path / "first"))
    assert info.missing_keys == info.unexpected_keys == set()
    assert_close(outputs(fresh, family), first)
    slotted = family.build()
    if name == "whisper" or family.parameters:
        # whisper's second adapter is in a convolution, and these first ones in experts, which have to be declared
        slotted.load_adapter(str(tmp_path / ("first" if family.parameters else "second")), "default")
        slotted.enable_peft_hotswap(target_rank=8, check_compiled="ignore")
    else:
        slotted.enable_peft_hotswap(target_rank=8)
        slotted.load_adapter(str(tmp_path / "second"), "default")
    for folder, expected in (("first", first), ("second", second), ("first", first)):
        slotted.load_adapter(str(tmp_path / folder), "default")
        assert_close(outputs(slotted, family), expected)
    slotted.disable_adapters()
    assert_close(outputs(slotted, family), bare)
    slotted.enable_adapters()
    fxpeft.remove(slotted)
    assert torch.equal(outputs(slotted, family), bare)
    assert [type(m) for m in slotted.modules()] == [type(m) for m in family.build().modules()]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_compiled_swaps(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    expected = {}
    for folder, other in (("first", False), ("second", True)):
        model = family.build()
        model.add_adapter(config(family, other=other))
        randomise(model.get_adapter_state_dict().values(), seed=1 + other)
        model.save_pretrained(tmp_path / folder)
        expected[folder] = outputs(model.eval(), family)
    model = family.build()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path / "first"), "default")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs(compiled, family)
        graphs = counter.frame_count
        for folder in ("second", "first", "second"):
            model.load_adapter(str(tmp_path / folder), "default")
            assert_close(outputs(compiled, family), expected[folder])
    assert counter.frame_count == graphs > 0


@pytest.mark.parametrize("name", ["qwen3 moe", "mixtral"])
def test_a_part_of_an_experts_lora_is_refused(name: str) -> None:
    model = FAMILIES[name].build()
    model.add_adapter(fxpeft.LoraConfig(target_modules=["q_proj"]))
    tensors = model.get_adapter_state_dict()
    stack, leaf = (".mlp", "down_proj") if name == "qwen3 moe" else (".block_sparse_moe", "w2")
    tensors[f"model.layers.1{stack}.experts.0.{leaf}.lora_A.weight"] = torch.zeros(8, 20 if ".mlp" in stack else 48)
    other = FAMILIES[name].build()
    with pytest.raises(fxpeft.CheckpointError, match=r"lora_B\.weight: expected \[32, 8\] .* found none"):
        other.load_adapter(peft_config=model.peft_config["default"], adapter_state_dict=tensors)
    assert not hasattr(other, "peft_config")
