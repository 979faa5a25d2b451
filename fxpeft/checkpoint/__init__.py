"""PEFT's files, both ways, and adapters that need no model."""

from fxpeft.checkpoint.assigning import Misfit, assign
from fxpeft.checkpoint.inferred import infer_config
from fxpeft.checkpoint.layouts import for_model, in_layout_of
from fxpeft.checkpoint.opening import read
from fxpeft.checkpoint.prompt_files import compose_cartridge_adapters, of_task, one_task
from fxpeft.checkpoint.reading import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    Checkpoint,
    base_of,
    read_config,
    read_pair,
    read_pickle,
    read_safetensors,
)
from fxpeft.checkpoint.writing import to_tensors, write, write_files

__all__ = [
    "CONFIG", "PICKLE", "WEIGHTS", "Checkpoint", "Misfit", "assign", "base_of", "compose_cartridge_adapters",
    "for_model", "in_layout_of", "infer_config", "of_task", "one_task", "read", "read_config", "read_pair",
    "read_pickle", "read_safetensors", "to_tensors", "write", "write_files",
]  # fmt: skip
