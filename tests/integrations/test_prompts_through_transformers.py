"""Prompts on a model whose methods are fxpeft's: the files that save_pretrained and Trainer write are PEFT's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_bert, tiny_llama, token_ids
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fxpeft
from fxpeft.integrations.transformers.trainer import restore

LLAMA: dict[str, Any] = {
    "prompt tuning": lambda: fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: fxpeft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=20, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: fxpeft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=20, task_type="CAUSAL_LM"
    ),
    "CPT": lambda: fxpeft.CPTConfig(
        cpt_token_ids=[5, 9, 3], cpt_tokens_type_mask=[1, 3, 4], opt_projection_format_epsilon=9.0
    ),
    "cartridge": lambda: fxpeft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
ENCODED = ("p-tuning", "prefix tuning")


def prompted(name: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model = tiny_llama()
    torch.manual_seed(seed)
    fxpeft.add_adapter(model, LLAMA[name]())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=token_ids(), attention_mask=torch.ones(2, 6, dtype=torch.long)).logits
    return found


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 11, "logging_steps": 1,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_ids(8)]
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])


def test_values_are_taken_from_a_state_dict(tmp_path: Path) -> None:
    model = prompted("prompt tuning")
    given = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    (found,) = load_file(tmp_path / "adapter_model.safetensors").values()
    torch.testing.assert_close(found, fxpeft.adapter_state_dict(model)["prompt_embeddings"] + 1)


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("plain", [False, True])
def test_the_file_is_pefts(name: str, plain: bool, tmp_path: Path) -> None:
    model = prompted(name)
    expected = logits(model)
    model.save_pretrained(tmp_path, save_peft_format=not plain)  # a prompt's keys have one form
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    assert list(model.get_adapter_state_dict()) == ["prompt_embeddings"]
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    with torch.no_grad():
        found = theirs(input_ids=token_ids(), attention_mask=torch.ones(2, 6, dtype=torch.long)).logits
    assert_close(found, expected)
    fresh = tiny_llama()
    fxpeft.load_adapter(fresh, tmp_path)
    assert_close(logits(fresh), expected)


def test_a_head_beside_the_prompt_has_pefts_keys(tmp_path: Path) -> None:
    model = tiny_bert()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    randomise(fxpeft.adapter_state_dict(model).values(), seed=3)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(stored) == ["base_model.classifier.bias", "base_model.classifier.weight", "prompt_embeddings"]
    assert sorted(model.get_adapter_state_dict()) == sorted(stored)
    theirs = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    with torch.no_grad():
        found = theirs(input_ids=token_ids(), attention_mask=torch.ones(2, 6, dtype=torch.long)).logits
    assert_close(found, expected)


def test_a_file_of_before_is_read(tmp_path: Path) -> None:
    """With keys that save_pretrained wrote once, and no one could read."""
    model = tiny_bert()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    randomise(fxpeft.adapter_state_dict(model).values(), seed=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": value for key, value in load_file(path).items()}, path)
    fresh = tiny_bert()
    fxpeft.load_adapter(fresh, tmp_path)
    assert_close(logits(fresh), logits(model), terms=1)
    randomise(fxpeft.adapter_state_dict(fresh).values(), seed=4)
    restore(fresh, tmp_path)
    assert_close(logits(fresh), logits(model), terms=1)


def test_a_saved_module_below_model_keeps_its_name() -> None:
    model = tiny_llama()
    config = fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", modules_to_save=["norm"])
    fxpeft.add_adapter(model, config)
    assert sorted(model.get_adapter_state_dict()) == sorted(fxpeft.adapter_state_dict(model))


@pytest.mark.parametrize("name", LLAMA)
def test_resuming_is_training_on(name: str, tmp_path: Path) -> None:
    whole = prompted(name)
    trainer(whole, tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = prompted(name, seed=5)
    assert not torch.allclose(logits(resumed), logits(whole), atol=1e-3)
    trained = trainer(resumed, tmp_path / "resumed")
    trained.train(resume_from_checkpoint=True)
    assert trained.state.global_step == 4
    assert_close(logits(resumed), logits(whole))


@pytest.mark.parametrize("name", LLAMA)
def test_the_best_prompt_is_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    model = prompted(name)
    trained = trainer(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1,
        learning_rate=5.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trained.train()
    best = Path(str(trained.state.best_model_checkpoint))
    fresh = tiny_llama()
    fxpeft.load_adapter(fresh, best)
    assert_close(logits(model), logits(fresh))
    assert trained.evaluate()["eval_loss"] == pytest.approx(trained.state.best_metric, rel=1e-4)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("stale", [False, True], ids=["no encoder", "another prompt's encoder"])
def test_a_finished_prompt_takes_the_encoders_place(
    name: str, stale: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = prompted(name, seed=8)
    fxpeft.save_adapter(source, tmp_path)
    if stale:
        prompted(name, seed=9).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "prompt_encoder.safetensors", tmp_path)
    model = prompted(name)
    with caplog.at_level("WARNING", "transformers.integrations.peft"):
        restore(model, tmp_path)
    assert "finished prompt" in caplog.text
    assert_close(logits(model), logits(source))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1  # the embedding alone: no layer of the encoder
    assert fxpeft.active_adapters(model) == ["default"]


def test_an_encoders_file_goes_with_its_encoder(tmp_path: Path) -> None:
    prompted("p-tuning").save_pretrained(tmp_path)
    assert (tmp_path / "prompt_encoder.safetensors").is_file()
    prompted("prompt tuning").save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()


@pytest.mark.parametrize("column", ["task_ids", "input_type_mask"])
def test_a_trainer_keeps_the_column_that_a_prompt_takes(column: str, tmp_path: Path) -> None:
    """It drops what the model's forward doesn't name."""
    model = tiny_llama()
    if column == "task_ids":
        fxpeft.add_adapter(model, fxpeft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=4))
        values = [torch.tensor(row % 2 + 1) for row in range(8)]
    else:
        fxpeft.add_adapter(model, LLAMA["CPT"]())
        values = [torch.tensor([1, 1, 2, 3, 4, 4])] * 8
    train = trainer(model, tmp_path, max_steps=2)
    for row, value in zip(train.train_dataset, values, strict=True):
        row[column] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train.train()
    changed = {
        name.rpartition(".")[2]: p.detach() - before[name] for name, p in model.named_parameters() if name in before
    }
    if column == "task_ids":
        moved = changed["prefix_task_rows"].abs().amax((1, 2)) > 0
        assert moved.tolist() == [False, True, True, False]
    else:
        assert changed["delta"].abs().amax(1).gt(0).tolist() == [True, True, False]
