"""Options of ``Trainer`` that reach into the model or the loss: each step is that of PEFT's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import VOCABULARY, randomise, tiny_llama
from transformers import Trainer, TrainingArguments

import fxpeft

CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2}


def trained(model: Any, folder: Path, **options: Any) -> list[float]:
    """The losses of three steps."""
    rows = torch.randint(1, VOCABULARY, (6, 6), generator=torch.Generator().manual_seed(3))
    rows[:, -1] = 2
    data = [{"input_ids": row, "labels": torch.where(row == 2, -100, row)} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=11, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def both(layers: int = 2, **fields: Any) -> tuple[Any, Any]:
    """fxpeft's and PEFT's model with one adapter of random values."""
    ours, other = tiny_llama(), tiny_llama()
    for model in (ours, other):
        model.model.layers = model.model.layers[:layers]
    theirs = peft.get_peft_model(other, peft.LoraConfig(**{**CONFIG, **fields}))
    fxpeft.add_adapter(ours, fxpeft.LoraConfig(**{**CONFIG, **fields}))
    values = fxpeft.adapter_state_dict(ours)
    randomise(values.values(), scale=0.2)
    peft.set_peft_model_state_dict(theirs, {k: v.clone() for k, v in values.items()})
    return ours, theirs


@pytest.mark.parametrize("options", [{"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.2}], ids=str)
def test_each_step_is_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both()
    wanted, found = (trained(model, tmp_path, **options) for model in (theirs, ours))
    assert found == pytest.approx(wanted, abs=2e-4)
    assert abs(found[0] - trained(both()[0], tmp_path)[0]) > 1e-3  # the option does something
    check_values(ours, theirs)


@pytest.mark.slow
def test_each_step_compiled_by_inductor_is_pefts_in_eager(tmp_path: Path) -> None:
    ours, theirs = both(layers=1, lora_dropout=0.0)  # whose masks a compiler draws otherwise
    wanted, found = trained(theirs, tmp_path), trained(ours, tmp_path, torch_compile=True)
    assert found == pytest.approx(wanted, abs=2e-4)
    check_values(ours, theirs)


def check_values(ours: Any, theirs: Any) -> None:
    """The adapters are equal after the steps."""
    values = fxpeft.adapter_state_dict(ours)
    for key, value in peft.get_peft_model_state_dict(theirs).items():
        assert_close(values[key], value, size=1.0, message=key)
