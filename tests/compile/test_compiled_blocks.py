"""Blocks compiled one by one (``layer = torch.compile(layer)``), before an adapter is added or after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tiny import randomise, tiny_llama, token_ids
from torch import nn
from transformers import LlamaForCausalLM

import fxpeft
from fxpeft.testing import no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
FULL = "model.layers.1.self_attn.q_proj"
CONFIG = {"r": 3, "lora_alpha": 7, "target_modules": [FULL, "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 2}}


def compile_blocks(model: LlamaForCausalLM, backend: str = "eager") -> None:
    """As users do, and one site on its own."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend=backend)
    inner = model.model.layers[0]._orig_mod
    inner.mlp.down_proj = torch.compile(inner.mlp.down_proj, backend=backend)


def folder_of(path: Path, seed: int, **values: object) -> tuple[Path, torch.Tensor]:
    """An adapter of the plain model, and the plain model's output with it."""
    model = tiny_llama().eval()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**{**CONFIG, **values}))
    randomise(fxpeft.adapter_state_dict(model).values(), seed)
    fxpeft.save_adapter(model, path)
    return path, model(token_ids()).logits.detach()


@pytest.mark.parametrize("when", ["before", "after"])
def test_names_are_those_of_the_uncompiled_model(when: str, tmp_path: Path) -> None:
    path, wanted = folder_of(tmp_path / "plain", 1)
    model = tiny_llama().eval()
    if when == "before":
        compile_blocks(model)
        fxpeft.load_adapter(model, path)
    else:
        fxpeft.load_adapter(model, path)
        compile_blocks(model)
    assert_close(model(token_ids()).logits, wanted)
    fxpeft.save_adapter(model, tmp_path / "again")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "again")]
    assert files[0].keys() == files[1].keys()
    assert not any("_orig_mod" in key for key in fxpeft.adapter_state_dict(model))
    assert fxpeft.adapter_config(model).target_modules == fxpeft.LoraConfig(**CONFIG).target_modules
    fxpeft.delete_adapter(model, "default")
    assert fxpeft.roles(model) == fxpeft.roles(tiny_llama())
    plan = fxpeft.plan(model, fxpeft.LoraConfig(r=3, target_modules="role:attention.query & layers[1]"))
    assert [site.name for site in plan.sites] == [FULL]
    assert "_orig_mod" not in str(plan)
    with pytest.raises(fxpeft.AdapterError) as error:
        fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["q_projj"]))
    assert "_orig_mod" not in str(error.value)


def test_slots_of_compiled_blocks_swap_without_compiling(tmp_path: Path) -> None:
    """With Inductor."""
    first, second = folder_of(tmp_path / "a", 1), folder_of(tmp_path / "b", 2, r=5, rank_pattern={})
    model, ids = tiny_llama().eval(), token_ids()
    compile_blocks(model, "inductor")
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "down_proj"])
    fxpeft.load_adapter(model, first[0], "a")
    with torch.no_grad():
        assert_close(model(ids).logits, first[1])
        with no_recompiles(warm=True):
            fxpeft.load_adapter(model, second[0], "b")
            assert_close(model(ids).logits, second[1])
            fxpeft.set_adapter(model, ["a", "b"])
            model(ids)
            fxpeft.set_adapter(model, "a")
            fxpeft.hotswap(model, second[0])
            assert_close(model(ids).logits, second[1])
            fxpeft.disable_adapters(model)
            assert_close(model(ids).logits, tiny_llama().eval()(ids).logits)
    fxpeft.remove(model)
    assert type(model.model.layers[0]._orig_mod.self_attn.q_proj) is nn.Linear


def test_a_head_that_is_saved_whole_may_be_compiled(tmp_path: Path) -> None:
    path, wanted = folder_of(tmp_path, 1, modules_to_save=["lm_head"])
    model = tiny_llama().eval()
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    fxpeft.load_adapter(model, path)
    assert_close(model(token_ids()).logits, wanted)
