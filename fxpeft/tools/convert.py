"""``fxpeft convert``: an adapter in another dtype, at a smaller rank, as plain LoRA, or for an engine."""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import fxpeft
from fxpeft.errors import AdapterError
from fxpeft.tools.answers import Json, Source, show

if TYPE_CHECKING:
    from fxpeft.checkpoint import Checkpoint
    from fxpeft.methods.config import AdapterConfig

Folded = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The base; default: the one that the adapter names.")
]


class To(StrEnum):
    """What methods can be converted to."""

    lora = "lora"


class For(StrEnum):
    """What takes one plain LoRA; see :mod:`fxpeft.checkpoint.engines`."""

    peft = "peft"
    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"


class Dtype(StrEnum):
    """What tensors can be converted to."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def convert(
    adapter: Source,
    output: Annotated[Path, typer.Argument(help="The new adapter's folder; with --for llama.cpp also a .gguf file.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new tensors.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The most ranks of a site: truncated SVD.")] = None,
    to: Annotated[To | None, typer.Option(help="Another method; it reads the base model.")] = None,
    engine: Annotated[For | None, typer.Option("--for", help="One rank, one alpha, for an engine.")] = None,
    task: Annotated[int | None, typer.Option(min=0, help="Of a multitask prompt: this task's, as a plain one.")] = None,
    rest: Annotated[Path | None, typer.Option(help="With --for: a folder for heads, biases and tokens.")] = None,
    model: Folded = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in another dtype, at a smaller rank or as plain LoRA, errors stated; in PEFT's format.

    With --for it is a LoRA of one rank and one alpha, which the engine can read, or an error says what it can't; what
    is no LoRA, or starts from the base's weights (PiSSA, OLoRA), is made one, which reads the base model. What
    it brings beside its sites, which no engine reads, --rest makes an adapter of its own, to be folded into the base.
    """
    import torch

    from fxpeft.checkpoint import of_task, read
    from fxpeft.checkpoint.adapter_file import cast, shrink
    from fxpeft.checkpoint.engines import ENGINES, for_engine, split
    from fxpeft.checkpoint.gguf_file import SUFFIX, write_gguf
    from fxpeft.checkpoint.writing import write_files
    from fxpeft.model.empty import empty_model, model_config

    if dtype is None and rank is None and to is None and engine is None and task is None:
        raise AdapterError("convert: say what to: --dtype, --rank, --to or --for, or which --task")
    as_gguf = output.suffix == SUFFIX
    if (rest is not None and engine is None) or (as_gguf and engine is not For.llama_cpp):
        raise AdapterError("convert: --rest needs --for, and a .gguf file --for llama.cpp")
    found, beside = read(adapter), None
    errors: dict[str, float] = {}
    if task is not None:
        found = of_task(found, task)
    if to is not None or (engine is not None and _needs_base(found)):
        with tempfile.TemporaryDirectory() as folder:  # an engine that can't take it leaves nothing behind
            found, errors = _as_lora(adapter, model, rank, output if engine is None else Path(folder))
    elif rank is not None:
        found, errors = shrink(found, rank)
    if rest is not None:
        found, beside = split(found)
    if engine is not None:
        asked, base_of = found.config, partial(_base_of, found, adapter, model)
        found, rounding = for_engine(found, ENGINES[engine.value], lambda: repeated(empty_model(base_of()), asked))
        errors = errors or rounding
    if dtype is not None:
        found = cast(found, getattr(torch, dtype.value))
    if as_gguf:
        write_gguf(output, found, model_config(base_of()))
    for folder_of, each in ((rest, beside), (None if as_gguf else output, found)):
        if folder_of is not None and each is not None:
            values = each.config.to_dict()
            if "peft_version" in values:  # the tensors lie as they did
                values["peft_version"] = each.release
            content = {key: value for key, value in values.items() if value or key != "peft_version"}
            write_files(folder_of, content, each.tensors)
    count = sum(t.numel() for t in found.tensors.values())
    worst = max(errors.values(), default=0.0)
    told = {"output": str(output), "parameters": count, "worst_error": worst, "errors": errors}
    told |= {} if beside is None else {"rest": str(rest), "rest_tensors": sorted(beside.tensors)}
    table = Table("site", "relative error of the update", box=None)
    for name, error in errors.items():
        table.add_row(name, f"{error:.3g}")
    lines = [f"{output}: {count:,} parameters", *([f"{rest}: what it brings beside its sites"] if beside else [])]
    show(as_json, told, *lines, *([table, f"worst: {worst:.3g}"] if errors else []))


def _needs_base(found: Checkpoint) -> bool:
    """Whether an adapter is no LoRA whose file alone says what it adds."""
    from fxpeft.methods import method_of
    from fxpeft.methods.inits import starts_from_base

    start = getattr(found.config, "init_lora_weights", True)
    return method_of(found.config).name not in ("lora", "alora") or starts_from_base(start) or start == "loftq"


def _base_of(found: Checkpoint, adapter: str, base: str | None) -> str:
    base = base or found.config.base_model_name_or_path
    if base is None:
        raise AdapterError(f"{adapter}: names no base model; say which with --model")
    return base


def repeated(model: Any, config: AdapterConfig) -> Any:
    """The base with its layers repeated as an adapter asks for, which PEFT does while it adds the adapter."""
    if layers := getattr(config, "layer_replication", None):
        fxpeft.replicate_layers(model, layers)
    return model


def adapted(adapter: str, base: str | None) -> tuple[Any, str]:
    """The base model with the adapter on it, and where it came from."""
    from fxpeft.checkpoint import read
    from fxpeft.model.empty import loaded_model

    found = read(adapter)
    base = _base_of(found, adapter, base)
    whole = repeated(loaded_model(base), found.config)
    fxpeft.load_adapter(whole, adapter, check_finite=True)
    return whole, base


def _as_lora(adapter: str, base: str | None, rank: int | None, output: Path) -> tuple[Checkpoint, dict[str, float]]:
    """The adapter as plain LoRA, and how far off it is at each site; the worst of these goes to stderr."""
    from fxpeft.checkpoint import read

    whole, _ = adapted(adapter, base)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        errors = fxpeft.convert(whole, "default", new_name="converted", rank=rank)
    for warning in told:
        if "approximates" in str(warning.message):
            print(f"warning: {warning.message}", file=sys.stderr)
    fxpeft.save_adapter(whole, output, "converted")
    return replace(read(output), source=adapter), errors
