"""What engines get: everything that their loaders read, and nothing that they refuse or pass over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add
from closeness import assert_close
from safetensors.torch import load_file
from tiny import tiny_llama, token_ids
from transformers import LlamaConfig, LlamaForSequenceClassification

import fxpeft
from fxpeft.checkpoint import read
from fxpeft.checkpoint.engines import ENGINES, for_engine
from fxpeft.checkpoint.writing import write_files


def saved(folder: Path, targets: list[str]) -> Any:
    model = tiny_llama()
    config = fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={r".*layers\.1\..*": 2})
    add(model, config)
    fxpeft.save_adapter(model, folder)
    return model


def written(folder: Path, found: Any) -> dict[str, torch.Tensor]:
    """The adapter in a folder, its config and tensors as a file has them."""
    write_files(folder, found.config.to_dict(), found.tensors)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "o_proj"], ["q_proj", "v_proj", "up_proj"], ["gate_proj"]])
def test_sglang_gets_all_of_what_it_stacks(targets: list[str], tmp_path: Path) -> None:
    model, ids = saved(tmp_path / "one", targets), token_ids()
    found, _ = for_engine(read(tmp_path / "one"), ENGINES["sglang"], tiny_llama)
    tensors = written(tmp_path / "out", found)
    sites = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    for site in sites:  # sglang/srt/lora/lora.py, normalize_qkv_proj and normalize_gate_up_proj
        parent, _, leaf = site.rpartition(".")
        for stack in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert leaf not in stack or {f"{parent}.{other}" for other in stack} <= sites
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["rank_pattern"]) == (3, 3, False, {})
    assert isinstance(config["target_modules"], list)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).eval()
    ours = tiny_llama()
    fxpeft.load_adapter(ours, tmp_path / "out")
    with torch.no_grad():
        assert_close(peer(ids).logits, model(ids).logits)
        assert_close(ours(ids).logits, model(ids).logits)


def test_what_is_there_whole_asks_for_no_base(tmp_path: Path) -> None:
    saved(tmp_path / "whole", ["q_proj", "k_proj", "v_proj", "down_proj"])
    found, _ = for_engine(read(tmp_path / "whole"), ENGINES["sglang"])
    assert found.tensors.keys() == read(tmp_path / "whole").tensors.keys()
    saved(tmp_path / "alone", ["q_proj"])
    with pytest.raises(fxpeft.AdapterError, match=r"sglang takes .*q_proj only with .*[kv]_proj"):
        for_engine(read(tmp_path / "alone"), ENGINES["sglang"])
    for_engine(read(tmp_path / "alone"), ENGINES["vllm"])  # fills up what it stacks by itself


def test_vllm_reads_the_head_of_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    model = LlamaForSequenceClassification(config).eval()
    add(model, fxpeft.LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS"))
    fxpeft.save_adapter(model, tmp_path / "one")
    assert "base_model.model.score.weight" in read(tmp_path / "one").tensors
    found, _ = for_engine(read(tmp_path / "one"), ENGINES["vllm"])
    assert "base_model.model.score.weight" in found.tensors
    with pytest.raises(fxpeft.AdapterError, match=r"sglang can't take it:\n.*score.weight: it reads nothing beside"):
        for_engine(read(tmp_path / "one"), ENGINES["sglang"])
