"""An adapter from PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``: a folder or the hub."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxpeft.checkpoint.keys import file_keys
from fxpeft.errors import AdapterError, CheckpointError, clipped, listing, short
from fxpeft.files import unfinished
from fxpeft.methods import config_class, method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.fingerprint import KEY
from fxpeft.outside import dense, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STAMP = "fxpeft_config"  # in the metadata of the tensors' file: the stamp of the config that was saved with it
TRIES = 50
LONGEST = 1_000  # characters of a key
VERSION = re.compile(r"\d{1,4}(\.\w{1,20}){1,5}(@\w{1,40})?")
# what safetensors and torch raise for headers that make no tensors
_DAMAGED = (KeyError, ValueError, TypeError, RuntimeError, OverflowError, AttributeError, MemoryError)


@dataclass
class Checkpoint:
    """A checkpoint's content, not yet checked against a model. ``source`` is for messages.

    The tensors' keys are those that PEFT's files have, whatever wrappers had put into them
    (:mod:`fxpeft.checkpoint.keys`). ``release``: the ``peft_version`` that the config's file names.
    """

    source: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    release: str | None = None

    def __post_init__(self) -> None:
        tensors = file_keys(dense(self.tensors, self.source), self.source)
        try:
            self.config, self.tensors = method_of(self.config).read(self.config, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {error}") from None


def read_pickle(path: Path, *, weights_only: bool) -> dict[str, Tensor]:
    """A pickled file's tensors; ``CheckpointError`` where it holds something else or is damaged.

    Args:
        weights_only: build tensors and plain values alone; otherwise the file can run any code.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        what = "read as a pickled state_dict of tensors" if weights_only else "unpickled"
        raise CheckpointError(f"{path}: can't be {what}: {error}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(tensors).__name__}")
    return dense(tensors, str(path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, in memory of their own; ``CheckpointError`` where it is damaged."""
    return read_whole(path)[0]


def read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and its metadata, of one and the same file, whoever puts another in its place."""
    with _opened(path) as file:
        tensors, metadata = dict(file.get_tensors()), dict(file.metadata() or {})
    long = [f"{short(key)} ({len(key):,} characters)" for key in tensors if len(key) > LONGEST]
    if long:
        raise CheckpointError(f"{path}: keys of more than {LONGEST:,} characters:\n{listing(long)}")
    return tensors, metadata


def base_of(folder: str | Path) -> str | None:
    """The fingerprint of the base that a folder's adapter was saved from; ``None`` where PEFT wrote it."""
    return metadata_of(Path(folder) / WEIGHTS).get(KEY)


def metadata_of(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. It isn't mapped: a mapped one that is written over changes the tensors."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError, *_DAMAGED) as error:
        raise CheckpointError(f"{path}: damaged or cut short, can't be read as safetensors: {error}") from error


def read_config(find: Callable[[str], Path | None], source: str) -> AdapterConfig:
    """Read and check ``adapter_config.json``."""
    path = config_path(find(CONFIG), source)
    return config_of(read_json(path), path)


def read_pair(
    path: Path, weights: Path, *, strict: bool = False
) -> tuple[AdapterConfig, dict[str, Tensor], str | None]:
    """A config, the tensors that were saved with it and its release, whoever saves into their folder meanwhile.

    fxpeft's own tensors' files say which config is theirs. Where that is not the one that is there, a save is between
    its two files, or died there, and its config lies beside; or the files were replaced while they were read, and
    are read again; or somebody edited the config, which is then taken with a warning.
    """
    for _ in range(TRIES):
        before = _identity(path), _identity(weights)
        values = read_json(path)  # first: a save replaces it last, so that tensors without a note are no newer
        config = config_of(values, path, strict)
        tensors, metadata = read_whole(weights)
        noted = metadata.get(STAMP)
        if noted is not None and stamp(values) != noted:
            others = (_pending(other) for other in unfinished(path))
            own = next((v for v in others if v is not None and stamp(v) == noted), None)
            if own is None and (_identity(path), _identity(weights)) == before:
                warnings.warn(f"{path}: it was changed after {weights.name} was saved with it", stacklevel=4)
                own = values
            if own is None:
                continue
            values = own
            config = config_of(values, path, strict)
        if _identity(weights) == before[1]:
            return config, tensors, release_of(values)
    raise CheckpointError(f"{path.parent}: its files were replaced each of the {TRIES} times that they were read")


def release_of(values: Mapping[str, Any]) -> str | None:
    named = values.get("peft_version")
    return named if isinstance(named, str) and VERSION.fullmatch(named) else None


def minor_of(release: str | None) -> int | None:
    """21 of ``0.21.2``."""
    named = re.match(r"0\.(\d{1,4})(?!\d)", release or "")
    return None if named is None else int(named[1])


def stamp(values: Mapping[str, Any]) -> str:
    """A hash of a config's content, however that is written down."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> tuple[int, ...]:
    """What changes where another file takes a file's place, or it is written to."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _pending(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CheckpointError:
        return None  # half written, or gone


def config_path(path: Path | None, source: str) -> Path:
    if path is None:
        raise CheckpointError(f"{source}: expected {CONFIG}, found none; is this an adapter's folder or hub id?")
    return path


def config_of(values: Mapping[str, Any], path: Path, strict: bool = False) -> AdapterConfig:
    try:
        return config_class(values.get("peft_type"), str(path)).from_dict(
            dict(values), source=str(path), loading=True, strict=strict
        )
    except AdapterError as error:
        raise CheckpointError(clipped(str(error))) from error
