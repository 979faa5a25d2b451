"""``Trainer`` on a plain model with an adapter: checkpoints hold the adapter alone, resuming and the best one work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_llama
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fxpeft
from fxpeft.testing import count_graphs

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # the name that users have

STEPS = 4
# Trainer's own files and the adapter's
EXPECTED = {
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip


def data(length: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, VOCABULARY, (length, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model = tiny_llama(dtype)
    torch.manual_seed(7)
    config = fxpeft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, **fields
    )
    model.add_adapter(config)
    return model


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1,
        "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 11, "save_total_limit": 5,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return Trainer(model=model, args=args, train_dataset=data(), eval_dataset=data(4))


def values(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.get_adapter_state_dict().items()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["plain", "checkpointing", "bf16", "bf16 checkpointing"],
)
def test_training_changes_the_adapter_alone(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = adapted()
    base = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    before = values(model)
    trained = trainer(model, tmp_path, **arguments)
    untrained = trained.evaluate(data())["eval_loss"]
    trained.train()
    assert trained.evaluate(data())["eval_loss"] < untrained - 0.01
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    after = values(model)
    assert all(not torch.equal(after[key], before[key]) for key in before)  # A and B of every site
    checkpoint = tmp_path / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} == EXPECTED
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(stored[f"base_model.model.{key}"], value) for key, value in after.items())


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain, checkpointed = adapted(), adapted()
    trainer(plain, tmp_path / "a").train()
    trainer(checkpointed, tmp_path / "b", gradient_checkpointing=True).train()
    mine, theirs = values(plain), values(checkpointed)
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in mine)


def test_half_precision_base_trains_a_float32_adapter(tmp_path: Path) -> None:
    model = adapted(torch.bfloat16)
    trained = trainer(model, tmp_path, bf16=True)
    untrained = trained.evaluate(data())["eval_loss"]
    trained.train()
    assert {value.dtype for value in values(model).values()} == {torch.float32}
    assert trained.evaluate(data())["eval_loss"] < untrained - 0.01


def test_head_as_a_module_to_save(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    head = model.lm_head.weight.clone()
    trainer(model, tmp_path).train()
    with fxpeft.disabled(model):  # while it is on, the attribute is the adapter's copy
        assert torch.equal(model.lm_head.weight, head)
    trained = values(model)["lm_head.weight"]
    assert not torch.equal(trained, head)
    stored = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.lm_head.weight"], trained)
    other = tiny_llama()
    other.load_adapter(str(tmp_path / "checkpoint-4"))
    model.eval()
    ids = data(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert_close(other(ids).logits, model(ids).logits, terms=1)


@pytest.mark.parametrize("arguments", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "modules_to_save"])
def test_resuming_is_training_on(tmp_path: Path, arguments: dict[str, Any]) -> None:
    whole = adapted(**arguments)
    trainer(whole, tmp_path / "whole").train()
    # a fresh model with another first adapter, from the checkpoint in the middle: all state has to come from the files
    resumed = adapted(**arguments)
    for value in resumed.get_adapter_state_dict().values():
        value.add_(1)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    trained = trainer(resumed, tmp_path / "resumed")
    trained.train(resume_from_checkpoint=True)
    assert trained.state.global_step == STEPS
    mine, theirs = values(resumed), values(whole)
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in mine)


def test_resuming_needs_a_checkpoint_of_this_adapter(tmp_path: Path) -> None:
    trainer(adapted(), tmp_path).train()
    other = tiny_llama()
    other.add_adapter(fxpeft.LoraConfig(r=5, target_modules=["q_proj", "down_proj"]))
    before = values(other)
    with pytest.raises(fxpeft.CheckpointError, match=r"expected \[5, 32\], found \[4, 32\]"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(values(other)[key], value) for key, value in before.items())


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted()
    # the rate grows so fast that a later step is worse
    trained = trainer(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1,
        learning_rate=2.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trained.train()
    best = Path(str(trained.state.best_model_checkpoint))
    assert best.name != f"checkpoint-{STEPS}"  # or the test would prove nothing
    stored = load_file(best / "adapter_model.safetensors")
    assert all(torch.equal(stored[f"base_model.model.{key}"], value) for key, value in values(model).items())
    assert trained.evaluate()["eval_loss"] == pytest.approx(trained.state.best_metric, rel=1e-5)


def test_compiled_training_compiles_once(tmp_path: Path) -> None:
    eager, compiled = adapted(), adapted()
    trainer(eager, tmp_path / "a").train()
    with torch._dynamo.config.patch(error_on_recompile=True), count_graphs() as count:
        trainer(compiled, tmp_path / "b", torch_compile=True, torch_compile_backend="aot_eager").train()
    assert (count.graphs, count.breaks) == (1, ())
    mine, theirs = values(eager), values(compiled)
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-5) for key in mine)
    assert {path.name for path in (tmp_path / "b" / "checkpoint-4").iterdir()} == EXPECTED


def test_save_model_writes_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    trained = trainer(model, tmp_path)
    trained.save_model(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == EXPECTED & {
        "adapter_config.json", "adapter_model.safetensors", "training_args.bin"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_pushes_from_a_checkpoint_take_the_adapter_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer

    uploads: list[set[str]] = []

    class Api:
        def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
            uploads.append({path.name for path in Path(folder_path).iterdir() if path.is_file()})
            return type("Job", (), {"is_done": lambda self: True, "done": lambda self: True})()

    trained = trainer(adapted(), tmp_path)
    trained.train()
    trained.hub_model_id, trained.push_in_progress = "me/tuned", None
    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    trained._push_from_checkpoint(str(tmp_path / "checkpoint-4"))
    assert uploads
    assert uploads[0] >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_bare_model_resumes_as_before(tmp_path: Path) -> None:
    whole, resumed = tiny_llama(), tiny_llama()
    trainer(whole, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in mine)
