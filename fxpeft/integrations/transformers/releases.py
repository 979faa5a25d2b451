"""What the releases of Transformers from 5.0 on have not yet, or elsewhere; each is named by the first that has it."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers.modeling_utils
import transformers.utils.hub
import transformers.utils.loading_report
from huggingface_hub import HfApi, is_offline_mode
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from fxpeft.passes.tried import minor

WHOLE_REPORT = hasattr(transformers.utils.loading_report, "LoadStateDictInfo")  # 5.2
if TYPE_CHECKING or WHOLE_REPORT:
    from transformers.utils.loading_report import LoadStateDictInfo as LoadStateDictInfo
else:
    from transformers.modeling_utils import LoadStateDictInfo as LoadStateDictInfo


def load_info(**values: Any) -> LoadStateDictInfo:
    """Transformers' report of a load: its fields with these values, and an empty one where there is none."""
    values = {"disk_offload_index": None, **values}  # until 5.1
    return LoadStateDictInfo(**{f.name: values[f.name] for f in dataclasses.fields(LoadStateDictInfo)})


def log_report(
    model: PreTrainedModel, source: str, ignore_mismatched_sizes: bool, info: LoadStateDictInfo, logger: logging.Logger
) -> None:
    """Transformers' table of what was missing, unexpected or mismatched; ``RuntimeError`` where it raises one."""
    write: Any = transformers.utils.loading_report.log_state_dict_report
    if WHOLE_REPORT:
        write(model, source, ignore_mismatched_sizes, info, logger)
        return
    options = transformers.modeling_utils.LoadStateDictConfig(
        pretrained_model_name_or_path=source, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    write(
        model=model, load_config=options, logger=logger, error_msgs=info.error_msgs,
        unexpected_keys=info.unexpected_keys, missing_keys=info.missing_keys, mismatched_keys=info.mismatched_keys,
        mismatched_shapes=info.mismatched_keys, conversion_errors=info.conversion_errors,
    )  # fmt: skip


LOCAL_SUBFOLDERS = minor(transformers.__version__) >= (5, 23)  # until then only the hub's are looked into


def find_adapter_config(source: str | os.PathLike[str] | None, **options: Any) -> str | None:
    """Where an adapter's config lies, in a folder's ``subfolder`` too; ``None``: nowhere.

    Args:
        options: as those of Transformers' ``find_adapter_config_file``.
    """
    if not LOCAL_SUBFOLDERS and source is not None and Path(source).is_dir() and options.get("subfolder"):
        source = Path(source, options["subfolder"])
    found: str | None = find_adapter_config_file(source, **options)  # type: ignore[arg-type]
    return found


def hf_api() -> HfApi:
    """The hub's client as Transformers configures it."""
    make: Any = getattr(transformers.utils.hub, "hf_api", HfApi)  # 5.10
    api: HfApi = make()
    return api


def resolve_revision(source: str | os.PathLike[str], revision: str | None, **options: Any) -> str | None:
    """The commit that a revision is now, so that all files of a load come from one; as it is where that isn't known.

    Args:
        options: ``token``, ``local_files_only``, ``cache_dir``.
    """
    resolve: Any = getattr(transformers.utils.hub, "resolve_revision", None)  # 5.18
    found: str | None
    if resolve is not None:
        found = resolve(source, revision, **options)
        return found
    if Path(source).exists() or options["local_files_only"] or is_offline_mode():
        return revision
    try:
        found = hf_api().model_info(str(source), revision=revision, token=options["token"]).sha
    except Exception:  # noqa: BLE001 - whatever the network raises: who downloads says it better, or has a cache
        return revision
    return found


def saves_here(model: PreTrainedModel, is_main_process: bool) -> bool:
    """Whether this process is the one that writes a model's files."""
    ask: Any = getattr(model, "should_save_on_this_rank", None)  # 5.17; until then the caller alone says it
    return is_main_process if ask is None else bool(ask(is_main_process))
