"""Files that are not as PEFT writes them today: what it wrote once, and tensors of several dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import add
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, token_ids

import fxpeft


def rewritten(folder: Path, change: Any, **fields: Any) -> None:
    """The folder's files with other tensors and other fields."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)


@pytest.mark.parametrize("start", [True, "bat"])
def test_bone_is_miss(start: Any, tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids()
    add(model, fxpeft.MissConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=start))
    fxpeft.save_adapter(model, tmp_path)
    rewritten(tmp_path, lambda tensors: {k.replace("miss_", "bone_"): t for k, t in tensors.items()}, peft_type="BONE")
    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        assert (model(ids).logits - tiny_llama()(ids).logits).abs().max() > 1e-3
        assert_close(loaded(ids).logits, model(ids).logits)
    fxpeft.save_adapter(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "MISS"


def test_the_permutations_of_boft_are_passed_over(tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids()
    add(model, fxpeft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))
    fxpeft.save_adapter(model, tmp_path)
    rewritten(tmp_path, lambda tensors: tensors | {
        key.replace("boft_R", "boft_P"): torch.eye(32)[None] for key in tensors if key.endswith("boft_R")
    })  # fmt: skip
    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits)


def test_another_oft_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, fxpeft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    fxpeft.save_adapter(model, tmp_path)
    rewritten(tmp_path, lambda tensors: {
        **{key.replace("oft_R.weight", "oft_r"): torch.zeros(8, 4, 4) for key in tensors},
        **{key.replace("oft_R.weight", "oft_s"): torch.ones(32, 1) for key in tensors},
    })  # fmt: skip
    with pytest.raises(fxpeft.CheckpointError, match=r"q_proj.oft_r: an OFT of PEFT before 0.16 .* expected oft_R"):
        fxpeft.load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("config", [
    fxpeft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"]),
    fxpeft.DeloraConfig(r=3, target_modules=["q_proj"]),
    fxpeft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
    fxpeft.LoHaConfig(r=2, target_modules=["q_proj"]),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_a_site_of_several_dtypes_has_the_widest(config: Any, tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids()
    add(model, config)
    fxpeft.save_adapter(model, tmp_path)

    def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: t.double() if number == 1 else t for number, (k, t) in enumerate(sorted(tensors.items()))}

    rewritten(tmp_path, mixed)
    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits)
