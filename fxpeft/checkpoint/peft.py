"""PEFT's checkpoint format both ways: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxpeft.adapters.state import Adapter, Values, find_state
from fxpeft.checkpoint.keys import below_module, file_keys
from fxpeft.errors import AdapterError, CheckpointError, clipped, listing, short
from fxpeft.files import make_folder, replace_files, unfinished
from fxpeft.methods import config_class, method_of
from fxpeft.methods.base import Base
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.fingerprint import KEY, fingerprint
from fxpeft.model.wrappers import submodule
from fxpeft.outside import dense, read_json, why_unfit
from fxpeft.passes.base import PassError, attribute, join
from fxpeft.targets.sites import AdapterPlan, base_modules, base_state, base_values, embedding_layer

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STAMP = "fxpeft_config"  # in the metadata of the tensors' file: the stamp of the config that was saved with it
TRIES = 50
LONGEST = 1_000  # characters of a key
# what safetensors and torch raise for headers that make no tensors
_DAMAGED = (KeyError, ValueError, TypeError, RuntimeError, OverflowError, AttributeError, MemoryError)


@dataclass
class Checkpoint:
    """A checkpoint's content, not yet checked against a model. ``source`` is for messages.

    The tensors' keys are those that PEFT's files have, whatever wrappers had put into them
    (:mod:`fxpeft.checkpoint.keys`).
    """

    source: str
    config: AdapterConfig
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.tensors = file_keys(dense(self.tensors, self.source), self.source)


@dataclass
class Misfit:
    """What of a checkpoint doesn't fit a model, for a caller who goes on without it.

    Args:
        missing: places that got no tensor. unexpected: keys that have no place.
        mismatched: key, shape in the file, shape in the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


def read(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = False,
) -> Checkpoint:
    """Read a checkpoint from a folder or from the Hugging Face hub.

    Args:
        allow_pickle: unpickle an ``adapter_model.bin`` that holds more than tensors and plain values.
        strict: refuse a config with fields that fxpeft doesn't know; otherwise they are told of.

    Raises:
        CheckpointError: a file is missing, damaged, or no adapter of a known method.
    """

    def find(name: str) -> Path | None:
        folder = Path(source)
        if folder.is_dir():
            path = folder / (subfolder or "") / name
            return path if path.is_file() else None
        return _from_hub(str(source), name, revision, subfolder, token, local_files_only)

    path = _config_path(find, str(source))
    weights = find(WEIGHTS)
    if weights is not None:
        return Checkpoint(str(source), *read_pair(path, weights, strict=strict))
    config = _config(read_json(path), path, strict)
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
    return Checkpoint(str(source), config, tensors)


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
    try:
        tensors = load_file(path, backend="pread")  # a mapped file that is written over changes the tensors
    except (SafetensorError, OSError, *_DAMAGED) as error:
        raise CheckpointError(f"{path}: damaged or cut short, can't be read as safetensors: {error}") from error
    long = [f"{short(key)} ({len(key):,} characters)" for key in tensors if len(key) > LONGEST]
    if long:
        raise CheckpointError(f"{path}: keys of more than {LONGEST:,} characters:\n{listing(long)}")
    return tensors


def base_of(folder: str | Path) -> str | None:
    """The fingerprint of the base that a folder's adapter was saved from; ``None`` where PEFT wrote it."""
    return _metadata(Path(folder) / WEIGHTS).get(KEY)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, *_DAMAGED) as error:
        raise CheckpointError(f"{path}: damaged or cut short, can't be read as safetensors: {error}") from error


def read_config(find: Callable[[str], Path | None], source: str) -> AdapterConfig:
    """Read and check ``adapter_config.json``."""
    path = _config_path(find, source)
    return _config(read_json(path), path)


def read_pair(path: Path, weights: Path, *, strict: bool = False) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A config and the tensors that were saved with it, whoever saves into their folder meanwhile.

    fxpeft's own tensors' files say which config is theirs. Where that is not the one that is there, a save is between
    its two files, or died there, and its config lies beside; or the files were replaced while they were read, and
    are read again; or somebody edited the config, which is then taken with a warning.
    """
    for _ in range(TRIES):
        before = _identity(path), _identity(weights)
        values = read_json(path)  # first: a save replaces it last, so that tensors without a note are no newer
        config = _config(values, path, strict)
        noted, tensors = _metadata(weights).get(STAMP), read_safetensors(weights)
        if noted is not None and stamp(values) != noted:
            others = (_pending(other) for other in unfinished(path))
            own = next((v for v in others if v is not None and stamp(v) == noted), None)
            if own is None and (_identity(path), _identity(weights)) == before:
                warnings.warn(f"{path}: it was changed after {weights.name} was saved with it", stacklevel=4)
                own = values
            if own is None:
                continue
            config = _config(own, path, strict)
        if _identity(weights) == before[1]:
            return config, tensors
    raise CheckpointError(f"{path.parent}: its files were replaced each of the {TRIES} times that they were read")


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


def _config_path(find: Callable[[str], Path | None], source: str) -> Path:
    path = find(CONFIG)
    if path is None:
        raise CheckpointError(f"{source}: expected {CONFIG}, found none; is this an adapter's folder or hub id?")
    return path


def _config(values: Mapping[str, Any], path: Path, strict: bool = False) -> AdapterConfig:
    try:
        return config_class(values.get("peft_type"), str(path)).from_dict(
            dict(values), source=str(path), loading=True, strict=strict
        )
    except AdapterError as error:
        raise CheckpointError(clipped(str(error))) from error


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
        if name == WEIGHTS:  # the cache may hold a pickled file alone
            return None
        raise CheckpointError(f"{repo}: no such folder, not in the hub's cache, and the hub can't be asked") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo}: no such folder, and the hub has no such adapter: {error}") from error


def _check_whole(adapter: Adapter, current: Values) -> None:
    """Refuse parameters of which this process holds a part only."""
    cut = [
        f"{site}: {name}: expected {list(own[name].shape)}, found {list(value.shape)}"
        for site, own in adapter.values.sites.items()
        for name, value in current.sites[site].items()
        if value.shape != own[name].shape
    ]
    if cut:
        raise AdapterError(
            f"adapter {adapter.name!r}: its parameters are not whole here:\n{listing(cut)}\nwith FSDP1, call this "
            "inside of FullyShardedDataParallel.summon_full_params(model), on every process"
        )


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys."""
    method, values = method_of(adapter.config), adapter.current()
    _check_whole(adapter, values)
    tensors: dict[str, Tensor] = {}
    for site, parameters in values.sites.items():
        plan = adapter.plan.sites[site]
        stored = method.stored(adapter.config, site, plan, parameters)
        tensors.update({method.key(site, plan, name): value for name, value in stored.items()})
    for path, parts in values.saved.items():
        tensors.update({f"{method.prefix}{path}.{k}": v for k, v in parts.items()})
    for path, tensor in values.tensors.items():
        if path in adapter.plan.weights:
            continue
        owner, _, leaf = path.rpartition(".")
        # PEFT wraps a site's module, which moves the base's own parameters one level down
        tensors[method.prefix + (f"{owner}.base_layer.{leaf}" if owner in values.sites else path)] = tensor
    return tensors


def write(folder: str | Path, model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write an adapter's two files, see :func:`write_files`.

    Args:
        tensors: what to write in place of :func:`to_tensors`.
    """
    values = adapter.config.to_dict()
    values["inference_mode"] = True
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if values["task_type"] is None and values["auto_mapping"] is None:
        cls = next(c for c in type(model).__mro__ if not hasattr(c, "_fxpeft_base"))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    write_files(folder, values, to_tensors(adapter) if tensors is None else tensors, base=fingerprint(model))


def write_files(
    folder: str | Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], *, base: str | None = None
) -> None:
    """Write ``adapter_config.json`` from ``values``, and the tensors; see :func:`~fxpeft.files.replacing`.

    The tensors' file, which is replaced first, notes which config it was saved with.

    Args:
        base: the base's fingerprint, noted there too.
    """
    folder = Path(folder)
    make_folder(folder)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", STAMP: stamp(json.loads(text)), **({KEY: base} if base else {})}
    # tied modules may share memory, safetensors can't
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    content = {
        folder / WEIGHTS: _in_order(save_tensors(stored, metadata=metadata)),
        folder / CONFIG: text.encode(),
    }
    replace_files(content)


def _in_order(data: bytes) -> bytes:
    """The same file, its metadata in order: safetensors writes them in any, and equal adapters are equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return data[:8] + text + data[8 + size :] if len(text) == size else data


def assign(
    model: nn.Module,
    plan: AdapterPlan,
    found: Checkpoint,
    *,
    check_finite: bool = False,
    misfit: Misfit | None = None,
) -> Values:
    """Find the place of every tensor of a checkpoint.

    Args:
        misfit: is told what is missing, unexpected or of another shape, which is then no error: the
            values lack those places.

    Raises:
        CheckpointError: keys that have no place, places that got no tensor, wrong shapes, NaN or
            infinity with ``check_finite``; all of them are named.
    """
    method, config = method_of(plan.config), plan.config
    kept = {key: tensor for key, tensor in found.tensors.items() if ".original_module." not in key}
    kept = below_module(model, kept, method.prefix)
    left = {_short(key, method.prefix): tensor for key, tensor in kept.items()}
    values = Values()
    missing: list[str] = []
    wrong: list[str] = []

    def take(key: str, shape: torch.Size | tuple[int, ...], own: torch.dtype | None = None) -> Tensor | None:
        tensor = left.pop(key, None)
        if tensor is None:
            missing.append(f"{key} {list(shape)}" if misfit is None else key)
        elif tuple(tensor.shape) != tuple(shape) and misfit is not None:
            misfit.mismatched.append((key, tuple(tensor.shape), tuple(shape)))
            return None
        elif tuple(tensor.shape) != tuple(shape):
            wrong.append(f"{key}: expected {list(shape)}, found {list(tensor.shape)}{_cure(model, shape, tensor)}")
        elif (why := why_unfit(tensor, own)) is not None:
            wrong.append(f"{key}: {why}")
        elif check_finite and not torch.isfinite(tensor).all():
            wrong.append(f"{key}: expected finite values, found NaN or infinity")
        return tensor

    for site, site_plan in plan.sites.items():
        shapes = {n: s for n, s in method.shapes(config, site_plan).items() if n not in method.frozen(config)}
        taken = {n: take(_short(method.key(site, site_plan, n), method.prefix), s) for n, s in shapes.items()}
        values.sites[site] = {n: t for n, t in taken.items() if t is not None}
    for path in plan.saved:
        own = base_state(submodule(model, path))
        taken = {k: take(f"{path}.{k}", v.shape, v.dtype) for k, v in own.items()}
        values.saved[path] = {k: t for k, t in taken.items() if t is not None}
    for path in plan.tensors:
        owner, _, leaf = path.rpartition(".")
        wrapped = f"{owner}.base_layer.{leaf}"
        tensor = take(wrapped if wrapped in left else path, attribute(model, path).shape)
        if tensor is not None:
            values.tensors[path] = tensor
    _base_weights(model, plan, left, values, wrong, misfit)
    _leave_out(plan, left, found.source)
    _into_declared(model, values)
    if misfit is not None:
        misfit.missing, misfit.unexpected = missing, list(left)
        missing, left = [], {}
    if missing or wrong or left:
        parts = [
            f"{title}\n{listing(items)}"
            for title, items in (
                ("places in the model that the file doesn't fill:", missing),
                ("tensors that don't fit:", wrong),
                ("keys that have no place in the model:", [f"{k} {list(t.shape)}" for k, t in left.items()]),
            )
            if items
        ]
        raise CheckpointError(
            f"{found.source} doesn't fit {type(model).__name__} with its own config; nothing was changed.\n"
            + "\n".join(parts)
            + "\nIs it an adapter of another base model, or are target_modules or rank_pattern in its config wrong?"
        )
    _restore(model, plan, values, found.source)
    return values


def _leave_out(plan: AdapterPlan, left: dict[str, Tensor], source: str) -> None:
    """Drop the tensors of modules that the plan leaves out, and say so."""
    dropped: dict[str, int] = {}
    for key in list(left):
        site = next((name for name in plan.left_out if key.startswith(f"{name}.")), None)
        if site is not None:
            del left[key]
            dropped[site] = dropped.get(site, 0) + 1
    if dropped:
        lines = [f"{site}: {count} tensors; {plan.left_out[site]}" for site, count in dropped.items()]
        warnings.warn(f"{source}: tensors of these modules are left out\n{listing(lines)}", stacklevel=4)


def _restore(model: nn.Module, plan: AdapterPlan, values: Values, source: str) -> None:
    """Work out what no file holds, from the base's weights."""
    method, config = method_of(plan.config), plan.config
    if not plan.weights and not method.frozen(config):
        return
    for path in plan.weights:
        values.tensors[path] = attribute(model, path).detach().clone()
    for site, site_plan in plan.sites.items():
        base = Base(submodule(model, site), values.own(site))
        shapes = {n: s for n, s in method.shapes(config, site_plan).items() if n in method.frozen(config)}
        device = attribute(base.module, "weight").device if shapes else None
        values.sites[site] |= {n: torch.empty(shape, device=device, dtype=torch.float32) for n, shape in shapes.items()}
        try:
            method.restore(config, site_plan, values.sites[site], base)
        except PassError as error:
            raise CheckpointError(
                f"{source}: {site}: it starts from the base's weight, which can't be decomposed here: {error}"
            ) from None


def _into_declared(model: nn.Module, values: Values) -> None:
    """Give a base weight in the file the slot of its module, where the model was prepared with one for it."""
    state = find_state(model)
    declared = () if state is None or state.serving is None else state.serving.saved
    for module in declared:
        brought = [path for path in values.tensors if path.startswith(f"{module}.")]
        if brought and module not in values.saved:
            own = {k: v.detach() for k, v in base_values(submodule(model, module)).items()}
            values.saved[module] = own | {p[len(module) + 1 :]: values.tensors.pop(p) for p in brought}


def _base_weights(
    model: nn.Module,
    plan: AdapterPlan,
    left: dict[str, Tensor],
    values: Values,
    wrong: list[str],
    misfit: Misfit | None,
) -> None:
    """Base weights in the file: PEFT saves embeddings too where they are targets or were resized.

    Equal to the model's they need nothing; otherwise the adapter brings its own, as PEFT's would.
    """
    brought: list[str] = []
    for key in list(left):
        path = key.replace(".base_layer.", ".")
        if path.rpartition(".")[2] not in ("weight", "bias"):
            continue
        try:
            own = attribute(model, path)
        except AttributeError:
            continue
        if not isinstance(own, Tensor):
            continue
        tensor = left.pop(key)
        if own.shape != tensor.shape and misfit is not None:
            misfit.mismatched.append((key, tuple(tensor.shape), tuple(own.shape)))
        elif own.shape != tensor.shape:
            cure = _cure(model, own.shape, tensor)
            wrong.append(f"{key}: expected {list(own.shape)}, found {list(tensor.shape)}{cure}")
        elif (why := why_unfit(tensor, own.dtype)) is not None:
            wrong.append(f"{key}: {why}")
        elif not own.is_meta and not _same(own.detach().cpu(), tensor):
            values.tensors[path] = tensor
            brought.append(path)
    for path in brought:  # one parameter under several names, of which PEFT writes into all at once
        for other in _tied(model, path):
            if other not in plan.tensors and not any(other.startswith(f"{saved}.") for saved in plan.saved):
                values.tensors.setdefault(other, values.tensors[path])


def _same(own: Tensor, tensor: Tensor) -> bool:
    """Whether one of two is the other, perhaps rounded to a narrower dtype."""
    return torch.equal(own, tensor.to(own.dtype)) or torch.equal(own.to(tensor.dtype), tensor)


def _tied(model: nn.Module, path: str) -> list[str]:
    """The other names of a base's parameter."""
    own = attribute(model, path)
    places = ((join(site, leaf), p) for site, module in base_modules(model) for leaf, p in module._parameters.items())
    return [name for name, parameter in places if parameter is own and name != path]


def _cure(model: nn.Module, own: torch.Size | tuple[int, ...], tensor: Tensor) -> str:
    """What to do where a tensor has a row for each token of another vocabulary."""
    embeddings = embedding_layer(model, "input") if isinstance(model, PreTrainedModel) else None
    weight = getattr(embeddings, "weight", None)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else None
    if not own or not tensor.ndim or own[0] != rows or tuple(own[1:]) != tuple(tensor.shape[1:]):
        return ""
    return f"; if the vocabulary was resized in training, call model.resize_token_embeddings({tensor.shape[0]}) first"


def _short(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).replace(".modules_to_save.", ".")
