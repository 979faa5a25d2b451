"""``Trainer`` and accelerate with adapters in two processes: DDP, FSDP1 and FSDP2, saved and resumed from shards."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from tiny import VOCABULARY, randomise, tiny_llama
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_processes import in_two_processes

import fxpeft
from fxpeft.integrations.accelerate import fsdp_auto_wrap_policy

STEPS, MIDDLE = 4, 2
# embeddings and a head beside the linears; the embedding's own weight lies in the file too
CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "embed_tokens"],
                          "modules_to_save": ["lm_head"], "rank_pattern": {"down_proj": 2}}  # fmt: skip
FSDP1 = {"version": 1, "sync_module_states": False}  # which accelerate does on accelerators alone
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    # not whole: FSDP1's offloaded state_dict is in memory that it frees, where that was on a CPU to begin with
    "fsdp1 shards": {"fsdp": True, "fsdp_config": {**FSDP1, "state_dict_type": "SHARDED_STATE_DICT"}},
    "fsdp2 whole": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True},
                    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": MIDDLE},
    "fsdp2 shards": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
}  # fmt: skip


def data(length: int = 16) -> list[dict[str, Tensor]]:
    rows = torch.randint(1, VOCABULARY, (length, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted() -> Any:
    model = tiny_llama()
    model.add_adapter(fxpeft.LoraConfig(**CONFIG))
    randomise((p for p in model.parameters() if p.requires_grad), seed=4)
    return model


def trainer(folder: Path, batch: int, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": batch, "learning_rate": 0.02, "logging_steps": 1,
        "save_steps": MIDDLE, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 11,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return Trainer(model=adapted(), args=args, train_dataset=data(), eval_dataset=data(4))


def losses(run: Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def as_on_accelerators() -> None:
    """accelerate shards models on accelerators alone: let it, on two processors."""
    given: Any = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        given(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.device = PartialState._shared_state["device"] = torch.device("cpu")  # not cpu:0
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All runs in one launch."""
    fxpeft.install()
    as_on_accelerators()
    said: dict[str, Any] = {}
    for name, arguments in RUNS.items():
        run = trainer(folder / name, 2, **arguments)
        run.train()
        kind = [part for part in run.model.modules() if isinstance(part, LlamaDecoderLayer)]
        said[f"{name} kinds"] = [type(run.model).__name__, type(run.model_wrapped).__name__, type(kind[0]).__name__]
        said[f"{name} losses"] = losses(run)
        fxpeft.save_adapter(run.model, folder / name / "saved") if rank == 0 or arguments else None
        del run
        gc.collect()
        again = trainer(folder / f"{name} again", 2, **{**arguments, "load_best_model_at_end": False})
        again.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{MIDDLE}"))
        said[f"{name} resumed"] = losses(again)
        values = fxpeft.adapter_state_dict(again.model)
        said[f"{name} values"] = {key: value.clone() for key, value in values.items()}
        del again
        gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two_processes(everything, folder, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process, with the batches of both."""
    with fxpeft.installed():
        run = trainer(tmp_path_factory.mktemp("one"), 4)
        run.train()
        fxpeft.save_adapter(run.model, run.args.output_dir)
    return losses(run), load_file(Path(run.args.output_dir) / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_save_and_resume_as_one(name: str, said: Any, alone: Any) -> None:
    folder, per_process = said
    expected, values = alone
    saved = load_file(folder / name / "saved" / "adapter_model.safetensors")
    assert saved.keys() == values.keys()
    if "whole" not in name:  # where the best, not the last, was loaded at the end
        for key, value in values.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-3, atol=1e-4, msg=key)
    for each in per_process:
        assert each[f"{name} losses"] == pytest.approx(expected, rel=1e-3)
        # accelerate reads no state of FSDP1's optimisers from shards, whatever the model
        count = 1 if name.startswith("fsdp1") else STEPS - MIDDLE
        assert each[f"{name} resumed"][MIDDLE - STEPS :][:count] == pytest.approx(expected[MIDDLE:][:count], rel=1e-3)
        for key, value in each[f"{name} values"].items() if count > 1 else ():
            torch.testing.assert_close(value, values[key], rtol=1e-3, atol=1e-4, msg=key)
    checkpoint = folder / name / f"checkpoint-{MIDDLE}"
    assert (checkpoint / "adapter_model.safetensors").is_file() is ("shards" not in name)
    if name.endswith("whole"):
        held = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
        assert held
        assert all(".adapters.default." in key for key in held)


def test_the_policy_wraps_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    policy: Any = fsdp_auto_wrap_policy(model)
    assert policy.keywords["transformer_layer_cls"] == {LlamaDecoderLayer}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,NoSuch")
    with pytest.raises(fxpeft.AdapterError, match="NoSuch: no module of this class"):
        fsdp_auto_wrap_policy(model)
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    with pytest.raises(fxpeft.AdapterError, match="name their class in the environment's"):
        fsdp_auto_wrap_policy(torch.nn.Linear(2, 3))
