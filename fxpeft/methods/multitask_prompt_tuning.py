"""Multitask prompt tuning (https://arxiv.org/abs/2303.02861): a prompt that tasks share, times a matrix of each task.

The forward takes ``task_ids``, the task of each row. A slot holds one finished prompt: that of an adapter with one
task, or what :func:`fxpeft.one_task` makes of one of several.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError, short
from fxpeft.methods.base import Base, SiteAdapter, SitePlan
from fxpeft.methods.prompt_inputs import embed_prompt
from fxpeft.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from fxpeft.methods.prompts import KEY, PromptAdapter, PromptMethod
from fxpeft.methods.row_prompts import TaskPrompts
from fxpeft.outside import dense
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.targets.kinds import Kind

TASKS = ("prefix_task_cols", "prefix_task_rows")
FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
STD = 0.02
Start = Literal[
    "TEXT", "SAMPLE_VOCAB", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"
]  # fmt: skip


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Names and defaults of ``peft.MultitaskPromptTuningConfig``.

    Args:
        prompt_tuning_init: as in :class:`~fxpeft.PromptTuningConfig`, of what is shared; or from an adapter that was
            trained on source tasks: ``"AVERAGE_SOURCE_TASKS"``: its shared prompt and the mean of its tasks' factors;
            ``"EXACT_SOURCE_TASK"``: those of one; ``"ONLY_SOURCE_SHARED"``: its shared prompt alone.
        prompt_tuning_init_state_dict_path: that adapter's file of tensors: ``.safetensors``, or a pickle, of which
            tensors alone are read. It is read where a fresh adapter is added, and never for one that is loaded.
        prompt_tuning_init_task: which task of it.
        num_ranks: of each task's matrix. num_tasks: how many tasks.
    """

    prompt_tuning_init: Start = "RANDOM"  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_ranks", "num_tasks")

    def to_dict(self) -> dict[str, Any]:
        """The config as PEFT writes it. A trained adapter no longer names what it began with: PEFT would read it."""
        values = super().to_dict()
        if self.inference_mode and self.prompt_tuning_init in FROM_SOURCE:
            values |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_state_dict_path": None}
        return values


class MultitaskAdapter(PromptAdapter):
    """The factors of all tasks in training."""

    prefix_task_cols: Tensor
    prefix_task_rows: Tensor

    def forward(self) -> TaskPrompts:
        """What the prompts of the rows' tasks are made of."""
        return TaskPrompts(self.embedding, self.prefix_task_cols, self.prefix_task_rows)


class MultitaskPromptTuning(PromptMethod[MultitaskPromptTuningConfig]):
    """The rows of a batch have each the prompt of its task; an encoder-decoder's encoder gets it."""

    name = "multitask_prompt_tuning"
    peft_type = "MULTITASK_PROMPT_TUNING"
    config_class = MultitaskPromptTuningConfig

    def resolved(self, model: PreTrainedModel, config: MultitaskPromptTuningConfig) -> MultitaskPromptTuningConfig:
        resolved = super().resolved(model, config)
        if resolved.num_transformer_submodules == 2:
            raise AdapterError(
                "num_transformer_submodules: expected 1, found 2, PEFT's default for encoder-decoder models: its "
                "training then puts a prompt before the decoder's inputs too, which its generate leaves out, so that "
                "other outputs are trained than come out"
            )
        return resolved

    def fresh(
        self,
        config: MultitaskPromptTuningConfig,
        plan: SitePlan,
        base: Base,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        sourced = config.prompt_tuning_init in FROM_SOURCE and not config.inference_mode
        start = config.changed(prompt_tuning_init="RANDOM") if sourced else config
        shared = PromptTuning().fresh(start, plan, base, device=device, dtype=dtype)
        shapes = self.shapes(config, plan)
        made = {n: torch.empty(shapes[n], dtype=torch.float32).normal_(0, STD) for n in TASKS} | shared
        if sourced:
            made |= _of_source(config, shapes)
        return {name: value.to(device, torch.float32, copy=True) for name, value in made.items()}

    def part(
        self,
        config: MultitaskPromptTuningConfig,
        plan: SitePlan,
        parameters: Mapping[str, Tensor],
        *,
        strength: float = 1.0,
    ) -> MultitaskAdapter:
        return MultitaskAdapter(plan, parameters)

    def of_length(self, num_virtual_tokens: int) -> MultitaskPromptTuningConfig:
        return MultitaskPromptTuningConfig(num_virtual_tokens=num_virtual_tokens, num_transformer_submodules=1)

    def unservable(self, config: MultitaskPromptTuningConfig) -> str:
        return "" if config.num_tasks == 1 else (
            f"it has a prompt for each of {config.num_tasks} tasks, and a slot holds one: give each task a folder of "
            "its own with fxpeft.one_task(source, folder, task)"
        )  # fmt: skip

    @torch.no_grad()
    def prompt(self, config: MultitaskPromptTuningConfig, plan: SitePlan, parameters: Mapping[str, Tensor]) -> Tensor:
        return task_prompt(parameters, None)

    def stored(
        self, config: MultitaskPromptTuningConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return dict(parameters)

    def unfinished(self, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {}

    def shapes(self, config: MultitaskPromptTuningConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shared = super().shapes(config, plan)
        rows, width = shared["embedding"]
        tasks, ranks = config.num_tasks, config.num_ranks
        return {**shared, **dict(zip(TASKS, ((tasks, rows, ranks), (tasks, ranks, width)), strict=True))}

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        return name if name in TASKS else KEY

    def bare_keys(self) -> Collection[str]:
        return (KEY, *TASKS)

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"embedding": KEY, **{name: name for name in TASKS}}

    def rewrite(self, name: str, config: MultitaskPromptTuningConfig, site: SiteAdapter) -> Feed:
        return replace(super().rewrite(name, config, site), function=embed_tasks, takes=("task_ids",))


def embed_tasks(inputs: dict[str, Any], *, prompt: TaskPrompts, **options: Any) -> dict[str, Any]:
    """Put the virtual tokens of each row's task before its embeddings; see :func:`embed_prompt`."""
    out = {name: value for name, value in inputs.items() if name != "task_ids"}
    if out.get("encoder_outputs") is not None:
        return out
    return embed_prompt(out, prompt=prompt.of(inputs.get("task_ids")), **options)


def task_prompt(parameters: Mapping[str, Tensor], task: int | None) -> Tensor:
    """One task's prompt, ``[rows, width]``; ``None``: of the only one."""
    cols, rows = (parameters[name] for name in TASKS)
    chosen = None if task is None else torch.tensor([task])
    found = TaskPrompts(parameters["embedding"], cols, rows).of(chosen)
    assert isinstance(found, Tensor)
    return found


def _of_source(config: MultitaskPromptTuningConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What a fresh adapter has from the file of one that was trained on source tasks.

    Raises:
        AdapterError: it can't be read, has no such task, or tensors that don't fit.
    """
    name, path = "prompt_tuning_init_state_dict_path", config.prompt_tuning_init_state_dict_path
    start = config.prompt_tuning_init
    if path is None:
        raise AdapterError(f"{name}: prompt_tuning_init={start!r} needs it, found None")
    found, made = _read(path), {}
    for key, own in (("embedding", KEY), *((key, key) for key in TASKS if start != "ONLY_SOURCE_SHARED")):
        value = found.get(own)
        if value is None or not value.is_floating_point() or not value.ndim:
            raise AdapterError(f"{name}: {path}: expected a tensor {own} of a multitask prompt in it, found none")
        if key in TASKS and start == "AVERAGE_SOURCE_TASKS":
            value = value.float().mean(0, keepdim=True)
        elif key in TASKS:
            task = config.prompt_tuning_init_task
            if task is None or not 0 <= task < len(value):
                raise AdapterError(
                    f"prompt_tuning_init_task: expected one of the {len(value)} tasks in {path}, found {task}"
                )
            value = value[task : task + 1]
        if tuple(value.shape) != shapes[key]:
            one = " (num_tasks: 1 with this start)" if key in TASKS else ""
            raise AdapterError(
                f"{name}: {path}: {own}: expected {list(shapes[key])}, by num_virtual_tokens, num_ranks and the "
                f"model's width, found {list(value.shape)}{one}"
            )
        made[key] = value
    return made


def _read(path: str) -> dict[str, Tensor]:
    """A file's tensors; nothing else of a pickle is built."""
    name = "prompt_tuning_init_state_dict_path"
    if not Path(path).is_file():
        raise AdapterError(f"{name}: {path}: expected a file, found none")
    try:
        whole = path.endswith(".safetensors")
        found = load_file(path) if whole else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of its reader
        raise AdapterError(f"{name}: {path}: can't be read as tensors: {short(str(error))}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{name}: {path}: expected a dict of tensors, found {type(found).__name__}")
    return dense(found, path)
