"""An adapter from where it is: PEFT's two files in a folder or on the hub, or one file of another format."""

from __future__ import annotations

from pathlib import Path

from fxpeft.checkpoint.formats import read_file
from fxpeft.checkpoint.reading import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    Checkpoint,
    config_of,
    config_path,
    read_pair,
    read_pickle,
    read_whole,
    release_of,
)
from fxpeft.errors import CheckpointError
from fxpeft.outside import read_json

PIPELINE = "pytorch_lora_weights.safetensors"  # diffusers' name


def read(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = False,
    weight_name: str | None = None,
    component: str | None = None,
) -> Checkpoint:
    """Read a checkpoint from a folder, from the Hugging Face hub, or from one ``.safetensors`` file.

    Args:
        weight_name: a file of another format in the folder or on the hub. Default: PEFT's two files, or where there
            are none diffusers' ``pytorch_lora_weights.safetensors``.
        component: which component of a pipeline the model is, in a file that holds several.
        allow_pickle: unpickle an ``adapter_model.bin`` that holds more than tensors and plain values.
        strict: refuse a config with fields that fxpeft doesn't know; otherwise they are told of.

    Raises:
        CheckpointError: a file is missing, damaged, or no adapter of a known method.
    """
    if Path(source).name == WEIGHTS and Path(source).is_file():
        source = Path(source).parent  # PEFT's config, which lies beside it, has the alphas

    def find(name: str) -> Path | None:
        folder = Path(source)
        if folder.is_file():
            return folder if name == PIPELINE else None
        if folder.is_dir():
            path = folder / (subfolder or "") / name
            return path if path.is_file() else None
        return _from_hub(str(source), name, revision, subfolder, token, local_files_only)

    config_file = None if weight_name else find(CONFIG)
    single = find(weight_name or PIPELINE) if config_file is None else None
    if weight_name and single is None:
        raise CheckpointError(f"{source}: expected {weight_name}, found none")
    if single is not None:
        return read_file(*read_whole(single), str(source), component)
    if component is not None:
        raise CheckpointError(f"component={component!r}: {source} has PEFT's two files, which are of one model")
    path = config_path(config_file, str(source))
    weights = find(WEIGHTS)
    if weights is not None:
        return Checkpoint(str(source), *read_pair(path, weights, strict=strict))
    written = read_json(path)
    config = config_of(written, path, strict)
    pickled = find(PICKLE)
    if pickled is None:
        raise CheckpointError(f"{source}: expected {WEIGHTS}, found none; is this an adapter's folder?")
    try:
        tensors = read_pickle(pickled, weights_only=True)
    except CheckpointError as error:
        if not allow_pickle:
            raise CheckpointError(
                f"{error}\nUnpickling the rest can run any code in the file. Convert it to {WEIGHTS}, or pass "
                "allow_pickle=True if you trust where it comes from"
            ) from error
        tensors = read_pickle(pickled, weights_only=False)
    return Checkpoint(str(source), config, tensors, release_of(written))


def _from_hub(
    repo: str, name: str, revision: str | None, subfolder: str | None, token: str | bool | None, local: bool
) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(repo, name, revision=revision, subfolder=subfolder, token=token, local_files_only=local)
        )
    except LocalEntryNotFoundError as error:
        if name in (WEIGHTS, CONFIG):  # the cache may hold a pickled file alone, or diffusers'
            return None
        raise CheckpointError(f"{repo}: no such folder, not in the hub's cache, and the hub can't be asked") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo}: no such folder, and the hub has no such adapter: {error}") from error
