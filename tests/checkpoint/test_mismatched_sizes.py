"""Tensors of other shapes are left out where that is asked for, and named; nothing else is let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import logits, randomise, tiny_bert

import fxpeft

LORA: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]
}  # fmt: skip
FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PEFT's file of a classifier with five classes, not three, and one A of another width."""
    model = tiny_bert()
    model.classifier = torch.nn.Linear(24, 5)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    randomise((p for n, p in theirs.named_parameters() if "lora_" in n or "modules_to_save" in n), seed=2)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[FIRST] = torch.ones(3, 20)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_places_of_other_shapes_get_first_values(folder: Path) -> None:
    model = tiny_bert()
    with pytest.warns(
        UserWarning, match=r"other shapes were left out:\n.*query\.lora_A\.weight: expected \[3, 24\], found \[3, 20\]"
    ):
        fxpeft.load_adapter(model, folder, ignore_mismatched_sizes=True)
    own, stored = fxpeft.adapter_state_dict(model), load_file(folder / "adapter_model.safetensors")
    left_out = {FIRST, "base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], stored[key]) for key in stored.keys() - left_out)
    assert torch.equal(own["base_model.model.classifier.weight"], model.classifier.weight)  # the base's own head
    assert own[FIRST].abs().sum() > 0
    # the same as in PEFT, whose A has other first values: with that A equal, so are the outputs
    with pytest.warns(UserWarning, match="ignored because you passed"):
        theirs = peft.PeftModel.from_pretrained(tiny_bert(), folder, ignore_mismatched_sizes=True).eval()
    peft.set_peft_model_state_dict(theirs, {**peft.get_peft_model_state_dict(theirs), FIRST: own[FIRST]})
    assert_close(logits(theirs), logits(model))


def test_without_the_word_it_is_an_error(folder: Path) -> None:
    model = tiny_bert()
    with pytest.raises(fxpeft.CheckpointError, match=r"expected \[3, 24\], found \[3, 20\]"):
        fxpeft.load_adapter(model, folder)
    assert not any("adapters" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_nothing_else_is_let_through(folder: Path, change: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    moved = tensors.pop(FIRST.replace("layer.0", "layer.1"))
    if change == "unexpected":
        tensors[FIRST.replace("layer.0", "layer.7")] = moved
    save_file(tensors, path)
    model = tiny_bert()
    with pytest.raises(fxpeft.CheckpointError, match="nothing was changed") as caught:
        fxpeft.load_adapter(model, folder, ignore_mismatched_sizes=True)
    assert "layer.1.attention.self.query.lora_A.weight" in str(caught.value)
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_embeddings_of_another_vocabulary(tmp_path: Path) -> None:
    """Base weights in the file, of a vocabulary that the base doesn't have: the base's own stay."""
    source = tiny_bert()
    theirs = peft.get_peft_model(source, peft.LoraConfig(r=3, target_modules=["query"]))
    randomise((p for n, p in theirs.named_parameters() if "lora_" in n), seed=2)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.bert.embeddings.word_embeddings.weight"] = torch.randn(47, 24)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = tiny_bert()
    with pytest.warns(UserWarning, match=r"word_embeddings\.weight: expected \[40, 24\], found \[47, 24\]"):
        fxpeft.load_adapter(model, tmp_path, ignore_mismatched_sizes=True)
    assert_close(logits(model), expected)
