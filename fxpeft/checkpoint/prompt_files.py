"""Files of prompts made of files of prompts: one task's of several, and cartridges one behind the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from fxpeft.checkpoint.opening import read
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.checkpoint.writing import write_files
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.cartridge import CartridgeConfig
from fxpeft.methods.multitask_prompt_tuning import TASKS, MultitaskPromptTuningConfig, task_prompt
from fxpeft.methods.prompt_tuning import PromptTuningConfig
from fxpeft.methods.prompts import KEY


def one_task(source: str | Path, output: str | Path, task: int) -> None:
    """Write one task's prompt of a multitask adapter as a plain soft prompt, which slots and PEFT take.

    Args:
        source: the adapter's folder or hub id. output: the new folder. task: from 0 on.

    Raises:
        AdapterError: it is no such adapter, or has no such task.
        CheckpointError: missing or damaged files.
    """
    _write(output, of_task(read(source), task))


def compose_cartridge_adapters(adapter_paths: Sequence[str | Path], *, output_path: str | Path) -> None:
    """Write several cartridges as one, their tokens one behind the other; as PEFT's function of this name.

    The first one's frozen tokens stay frozen, those of the others are trained with the rest.

    Raises:
        AdapterError: fewer than two, one that is no cartridge, or of another model or task.
        CheckpointError: missing or damaged files.
    """
    if len(adapter_paths) < 2:
        raise AdapterError(f"adapter_paths: expected two cartridges or more, found {len(adapter_paths)}")
    found = [read(path) for path in adapter_paths]
    first = found[0]
    for each in found:
        if not isinstance(each.config, CartridgeConfig):
            raise AdapterError(f"{each.source}: expected a CARTRIDGE adapter, found {each.config.peft_type}")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            own, wanted = getattr(each.config, name), getattr(first.config, name)
            if own != wanted:
                raise AdapterError(f"{each.source}: {name}: expected {wanted}, as {first.source}, found {own}")
        rows = each.tensors.get(KEY)
        if rows is None or rows.ndim != 2 or each.tensors.keys() != {KEY}:
            raise AdapterError(f"{each.source}: expected {KEY} [tokens, width] alone, found {', '.join(each.tensors)}")
    widths = [each.tensors[KEY].shape[1] for each in found]
    if len(set(widths)) > 1:
        raise AdapterError(f"{KEY}: expected cartridges of one width, found {', '.join(map(str, widths))}")
    rows = torch.cat([each.tensors[KEY] for each in found])
    config = dataclasses.replace(first.config, num_virtual_tokens=len(rows))  # type: ignore[call-arg]
    _write(output_path, Checkpoint(first.source, config, {KEY: rows}, first.release))


def of_task(found: Checkpoint, task: int) -> Checkpoint:
    """One task's prompt as prompt tuning's; what the adapter brings beside it stays."""
    config = found.config
    if not isinstance(config, MultitaskPromptTuningConfig):
        raise AdapterError(f"{found.source}: expected MULTITASK_PROMPT_TUNING, found {config.peft_type}")
    if not 0 <= task < config.num_tasks:
        raise AdapterError(f"task: expected one of {config.num_tasks}, 0 to {config.num_tasks - 1}, found {task}")
    parts = {"embedding": found.tensors.get(KEY), **{name: found.tensors.get(name) for name in TASKS}}
    shapes = {name: None if value is None else list(value.shape) for name, value in parts.items()}
    rows, ranks = config.num_virtual_tokens, config.num_ranks
    width = shapes["embedding"][-1] if shapes["embedding"] else None
    tasks = config.num_tasks
    wanted = {"embedding": [rows, width], TASKS[0]: [tasks, rows, ranks], TASKS[1]: [tasks, ranks, width]}
    own = {name: value for name, value in parts.items() if value is not None}
    if shapes != wanted or not all(value.is_floating_point() for value in own.values()):
        raise CheckpointError(f"{found.source}: expected tensors {wanted}, by its config, found {shapes}")
    prompt = task_prompt({name: value.float() for name, value in own.items()}, task).to(own["embedding"].dtype)
    kept = {field.name for field in dataclasses.fields(PromptTuningConfig) if field.init}
    values = {key: value for key, value in config.to_dict().items() if key in kept}
    start = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None}
    rest = {key: value for key, value in found.tensors.items() if key not in (KEY, *TASKS)}
    plain = PromptTuningConfig.from_dict({**values, **start}, found.source, loading=True)
    return Checkpoint(found.source, plain, {KEY: prompt, **rest}, found.release)


def _write(folder: str | Path, made: Checkpoint) -> None:
    write_files(folder, made.config.changed(inference_mode=True).to_dict(), made.tensors)
