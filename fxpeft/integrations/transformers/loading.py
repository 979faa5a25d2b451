"""An adapter as Transformers names it (id, config object, state_dict) to a plan and values for a model."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file

from fxpeft import checkpoint
from fxpeft.adapters.loading import load
from fxpeft.adapters.values import complete, fresh_values, placed, shared_placement
from fxpeft.checkpoint import Checkpoint
from fxpeft.errors import AdapterError, CheckpointError, listing
from fxpeft.integrations.transformers.releases import (
    LoadStateDictInfo,
    find_adapter_config,
    load_info,
    resolve_revision,
)
from fxpeft.methods import config_class, method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.model.placement import placement
from fxpeft.model.walk import site_module
from fxpeft.model.wrappers import submodule
from fxpeft.outside import read_json
from fxpeft.targets.sites import AdapterPlan

DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def as_config(config: object) -> AdapterConfig:
    """fxpeft's config of the same fields.

    Args:
        config: one of fxpeft's (returned as it is); what ``adapter_config.json`` holds; or an object
            of PEFT's config classes, which is read through its ``to_dict`` without importing PEFT.

    Raises:
        TypeError: none of these. AdapterError: a field that fxpeft can't honour; it is named.
    """
    if isinstance(config, AdapterConfig):
        return config
    if not isinstance(config, Mapping):
        from_peft = any(cls.__module__.partition(".")[0] == "peft" for cls in type(config).__mro__)
        if not from_peft or not hasattr(config, "to_dict"):
            raise TypeError(
                f"adapter_config should be one of fxpeft's configs, such as LoraConfig. Got {type(config)} instead."
            )
    values = dict(config if isinstance(config, Mapping) else config.to_dict())
    values = json.loads(json.dumps(values, default=_plain))  # enums, sets and tuples as the file would have them
    source = type(config).__name__
    return config_class(values.get("peft_type"), source).from_dict(values, source=source)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def read(
    source: str | os.PathLike[str] | None,
    config: object,
    tensors: Mapping[str, Tensor] | None,
    *,
    download: Mapping[str, Any],
    use_safetensors: bool | None = None,
) -> Checkpoint:
    """Read an adapter's config and tensors, whichever of them was not given.

    Args:
        source: a folder, or an id on the hub; both files come from the same commit.
        download: arguments of Transformers' ``cached_file``; see :data:`DOWNLOAD`.
        use_safetensors: ``None``: ``adapter_model.safetensors``, else ``adapter_model.bin``, which is
            unpickled with ``weights_only=True``; ``False``: the other order; ``True``: no ``.bin``.

    Raises:
        OSError, ValueError: there is no such file, as from Transformers.
        CheckpointError: a file is damaged, or no adapter of a known method.
    """
    download = dict(download)
    if source is not None:
        download["revision"] = resolve_revision(
            source, download.get("revision"), token=download.get("token"),
            local_files_only=bool(download.get("local_files_only")), cache_dir=download.get("cache_dir"),
        )  # fmt: skip
    path = None
    if config is None:
        path = find_adapter_config(source, **download)
        if path is None:
            raise ValueError(
                f"adapter model file not found in {source}. Make sure you are passing the correct path to the adapter "
                "model."
            )
    weights = None if tensors is not None or source is None else _find_tensors(source, download, use_safetensors)
    if path is not None and weights is not None and weights.name == checkpoint.WEIGHTS:
        return Checkpoint(str(source), *checkpoint.read_pair(Path(path), weights))
    given = as_config(config) if path is None else checkpoint.read_config(lambda name: Path(path), str(source))
    if tensors is not None:
        return Checkpoint("the state_dict", given, dict(tensors))
    if weights is None:
        raise ValueError("peft_config was given without weights: pass adapter_state_dict or peft_model_id too")
    if weights.name == checkpoint.WEIGHTS:
        return Checkpoint(str(source), given, checkpoint.read_safetensors(weights))
    return Checkpoint(str(source), given, checkpoint.read_pickle(weights, weights_only=True))


def options_of(
    source: str | None,
    given: LoadStateDictConfig | None,
    local_files_only: bool,
    adapter_kwargs: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
) -> tuple[LoadStateDictConfig, dict[str, Any]]:
    """Transformers' load config and the arguments of downloads; ``TypeError`` for an unknown argument."""
    direct = {key: value for key, value in kwargs.items() if key in DOWNLOAD}
    fields = {**(vars(given) if given is not None else {}), **{k: v for k, v in kwargs.items() if k not in direct}}
    options = LoadStateDictConfig(**fields)
    download: dict[str, Any] = dict(options.download_kwargs or {})
    if given is not None and source is not None and given.pretrained_model_name_or_path != source:
        download.pop("revision", None)  # the base model's, not the adapter's
        download.pop("subfolder", None)
    own = {key: value for key, value in (adapter_kwargs or {}).items() if key in DOWNLOAD}
    download = {**download, **direct, **own}
    if local_files_only:
        download["local_files_only"] = True
    return options, {key: value for key, value in download.items() if key in DOWNLOAD and value is not None}


def _find_tensors(source: str | os.PathLike[str], download: Mapping[str, Any], use_safetensors: bool | None) -> Path:
    names = [checkpoint.WEIGHTS, checkpoint.PICKLE]
    if use_safetensors is not None:
        names = names[:1] if use_safetensors else names[::-1]
    for name in names:
        path = cached_file(source, name, **download, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return Path(path)
    raise OSError(f"Could not download either a .bin or a .safetensors adapter file: {source} has neither.")


@dataclass
class Fitted:
    """An adapter's values for one model, and what did not fit in the form that Transformers returns."""

    plan: AdapterPlan
    values: Values
    info: LoadStateDictInfo


def fit(
    model: PreTrainedModel,
    found: Checkpoint,
    name: str,
    *,
    trainable: bool,
    conversions: Sequence[WeightTransform] | None = None,
) -> Fitted:
    """Match an adapter with a model; the model is not touched.

    As in Transformers, places that the file doesn't fill or fills with another shape get first
    values, and keys that have no place are left out; the report names all of them. Parameters to be
    trained are float32 where the base is in half precision, others have the base's dtype.

    Args:
        name: the adapter's, for the report.
        conversions: the table by which the base's own keys were renamed, with the user's ``key_mapping`` in it.

    Raises:
        CheckpointError: nothing of the file fits, or a tensor is damaged.
        AdapterError: the config doesn't fit the model.
    """
    config = copy.deepcopy(found.config)
    config.inference_mode = not trainable
    check_injectable(config)
    misfit = checkpoint.Misfit()
    found = replace(found, config=config)
    plan, values = load(Modules(model), found, conversions=conversions, misfit=misfit)
    if not any((*values.sites.values(), values.tokens, values.saved if not plan.sites else {})):
        raise CheckpointError(
            f"{found.source}: none of its {len(found.tensors)} tensors belongs to one of the {len(plan.sites)} sites "
            f"that its config selects in {type(model).__name__}; is it an adapter of another base model?"
        )
    if misfit.unexpected:
        # Transformers' report goes to a log that says they can be ignored: what is missing is a part of the adapter
        warnings.warn(
            f"{found.source}: {len(misfit.unexpected)} of its {len(found.tensors)} tensors have no place in "
            f"{type(model).__name__} under any name that Transformers knows for them, and are left out, so the outputs "
            f"are not those of the adapter that was trained:\n{listing(misfit.unexpected, 5)}\nIs it an adapter of "
            "another base model? key_mapping of from_pretrained renames keys",
            stacklevel=3,
        )
    if misfit.missing or misfit.mismatched:
        complete(values, fresh_values(model, plan, autocast=trainable))
    mismatched: Any = {(_named(plan, key, name), *shapes) for key, *shapes in misfit.mismatched}
    info = load_info(
        missing_keys={_named(plan, key, name) for key in misfit.missing},
        unexpected_keys={_named(plan, key, name) for key in misfit.unexpected},
        mismatched_keys=mismatched, error_msgs=[], conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip
    values = placed(model, values, autocast=trainable)
    if not trainable:
        for site, parameters in values.sites.items():
            module, leaf = site_module(model, site)
            _, dtype = placement(module, model, False, leaf)
            values.sites[site] = {n: v.to(dtype) if v.is_floating_point() else v for n, v in parameters.items()}
        for name, rows in values.tokens.items():
            values.tokens[name] = rows.to(placement(submodule(model, name), model, False)[1])
        if values.shared:
            _, dtype = shared_placement(model, values.sites, False)
            values.shared = {name: value.to(dtype) for name, value in values.shared.items()}
    return Fitted(plan, values, info)


def _named(plan: AdapterPlan, key: str, name: str) -> str:
    """A key with the adapter's name in it, as PEFT's parameters have it and Transformers reports it."""
    for path in plan.saved:
        if key.startswith(f"{path}."):
            return f"{path}.modules_to_save.{name}{key.removeprefix(path)}"
    return re.sub(r"\.(?:lora|ia3)_[^.]*", lambda match: f"{match[0]}.{name}", key, count=1)


def check_injectable(config: AdapterConfig) -> None:
    """Refuse prompt learning, as Transformers does: it is no adapter of a model's modules."""
    if method_of(config).feeds:
        raise AdapterError(
            f"{config.peft_type}: Transformers' adapter methods don't take prompt learning; use fxpeft.add_adapter and "
            "fxpeft.load_adapter"
        )


def split_adapter_kwargs(source: object, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained``, with an adapter's own place given to the adapter alone.

    Transformers looks the base model up at the adapter's ``subfolder`` and ``revision`` too. Here
    they go to ``adapter_kwargs``, and the base is taken at the revision that the adapter's config
    records. A folder that holds a whole model with an adapter in it is left to Transformers.

    Raises:
        AdapterError: the adapter's config names no base model.
    """
    own = dict(kwargs.get("adapter_kwargs") or {})
    if not isinstance(source, str | os.PathLike) or "_adapter_model_path" in own:
        return kwargs
    subfolder, revision = kwargs.get("subfolder") or "", kwargs.get("revision")
    local = Path(source).is_dir()
    if not (local or subfolder or revision):
        return kwargs  # a plain hub id: Transformers asks the hub itself
    lookup = {key: kwargs[key] for key in DOWNLOAD if kwargs.get(key) is not None} | own
    path = find_adapter_config(source, **lookup)
    if path is None or (local and (Path(source, lookup.get("subfolder", "")) / "config.json").is_file()):
        return kwargs
    embedded = local and Path(source, "config.json").is_file()
    config = read_json(Path(path))
    if not embedded and not config.get("base_model_name_or_path"):
        raise AdapterError(
            f"{path}: base_model_name_or_path: expected the base model's folder or id, found none. Write it there, or "
            "load the base model and call its load_adapter"
        )
    rest = {key: value for key, value in kwargs.items() if key not in ("subfolder", "revision")}
    if subfolder:
        own.setdefault("subfolder", subfolder)
    if revision:
        own.setdefault("revision", revision)
    if not embedded and config.get("revision"):
        rest["revision"] = config["revision"]
    return {**rest, "adapter_kwargs": own}
