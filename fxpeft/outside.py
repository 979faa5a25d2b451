"""What comes from outside, checked before anything is done with it: files, JSON values, tensors."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxpeft.errors import CheckpointError, listing, short

LARGEST = 16 * 2**20  # bytes of a config: the names of a model's 20,000 sites are less than two million
DEEPEST = 16  # objects and lists of a config in each other
_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)  # that a module's buffer may be


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no regular file, too large, or no JSON object.
    """
    try:
        if not path.is_file():  # a pipe would wait for a writer, without end
            raise CheckpointError(f"{path}: expected a file, found none, or what is no regular file")
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, expected a config of at most {LARGEST:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged, can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(values).__name__}")
    return values


def why_odd(value: object, depth: int = 0) -> str | None:
    """Why a config's value is none that JSON, tensors and files can hold; ``None`` where it is."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "expected an integer of 64 bits, found a larger one"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"expected a finite number, found {value}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"expected text, found half of a surrogate pair in {value[:100]!a}"
        return None
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if depth >= DEEPEST:
            return f"expected at most {DEEPEST} lists and objects in each other"
        parts = (*value, *value.values()) if isinstance(value, Mapping) else value
        return next((why for part in parts if (why := why_odd(part, depth + 1))), None)
    return None


def dense(tensors: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """A state_dict's values as dense tensors with memory; numpy's arrays and 8-bit floats are converted.

    Integers pass: modules have buffers of them. Which place takes them is for who assigns them.

    Raises:
        CheckpointError: a key or value of another sort; all are named.
    """
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in tensors.items():
        if not isinstance(key, str):
            problems.append(f"{short(key)}: expected text as the key, found {type(key).__name__}")
            continue
        if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
            with contextlib.suppress(TypeError):  # no dtype of torch's
                value = torch.as_tensor(value.copy())
        why = _why_not(value)
        if why is not None:
            problems.append(f"{short(key)}: expected a dense tensor of floating-point numbers, found {why}")
        else:
            found[key] = value.float() if value.is_floating_point() and value.itemsize == 1 else value
    if problems:
        raise CheckpointError(f"{source}: no tensors of an adapter; nothing was changed.\n{listing(problems)}")
    return found


def _why_not(value: object) -> str | None:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_quantized:
        return "a quantized one"
    if value.is_nested:
        return "a nested one"
    if value.layout is not torch.strided:
        return f"one with layout {str(value.layout).removeprefix('torch.')}"
    if value.is_meta:
        return "one on the meta device, without values"
    if value.dtype not in _NUMBERS and (not value.is_floating_point() or "float4" in str(value.dtype)):
        return str(value.dtype).removeprefix("torch.")
    return None


def why_unfit(tensor: Tensor, own: torch.dtype | None) -> str | None:
    """Why a tensor can't take the place of one of dtype ``own``, by default an adapter's: ``None`` where it can."""
    wanted = torch.float32 if own is None else own
    if wanted.is_floating_point:
        fits = tensor.is_floating_point()
    else:
        fits = tensor.dtype == wanted or (not tensor.is_floating_point() and torch.bool not in (tensor.dtype, wanted))
    expected = "floating-point numbers" if wanted.is_floating_point else str(wanted).removeprefix("torch.")
    return None if fits else f"expected {expected}, found {str(tensor.dtype).removeprefix('torch.')}"
