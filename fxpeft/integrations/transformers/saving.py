"""``save_pretrained`` of a model with adapters: the active one's two files, whole or not at all."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

from fxpeft import checkpoint
from fxpeft.adapters.agreement import written
from fxpeft.adapters.embeddings import embedding_tensors
from fxpeft.adapters.saving import adapter_tensors
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.checkpoint.model_card import CARD, write_card
from fxpeft.files import replace_files
from fxpeft.integrations.transformers.held import held_adapter, only_active, without_prefix
from fxpeft.integrations.transformers.model_state import LOADED, adapters_of, logger
from fxpeft.integrations.transformers.releases import hf_api, saves_here
from fxpeft.methods import method_of
from fxpeft.model.wrappers import plain_name
from fxpeft.passes.live import Container

UNFINISHED = "prompt_encoder.safetensors"  # what comes out of it is all that PEFT's format has
USED = ("save_directory", "is_main_process", "state_dict", "push_to_hub", "token", "save_peft_format")


def saves_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``PreTrainedModel.save_pretrained``, for models with fxpeft's adapters too.

    Transformers' arguments keep their meaning. Sharding and variants don't apply to two files.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not adapters_of(self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        if not getattr(self, LOADED):  # switched off by a model that saves its base too
            if given.arguments.get("state_dict") is None:
                given.arguments["state_dict"] = base_state_dict(self)
            return original(*given.args, **given.kwargs)
        given.apply_defaults()
        return _save(self, **{name: given.arguments[name] for name in USED}, **given.arguments["kwargs"])

    return save_pretrained


def base_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's ``state_dict`` without what fxpeft put into it."""
    own = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Container))
    return {plain_name(key): value for key, value in model.state_dict().items() if not key.startswith(own)}


def unfinished(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter's training goes on from beside its files, as a prompt's encoder; else empty."""
    found = method_of(adapter.config).unfinished(adapter.current().sites)
    return {key: value.cpu().contiguous() for key, value in found.items()}


def write_unfinished(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what :func:`unfinished` gave beside an adapter's files, or take the file of an earlier save away."""
    if tensors:
        replace_files({folder / UNFINISHED: save_tensors(tensors)})
    else:
        (folder / UNFINISHED).unlink(missing_ok=True)


def _save(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None,
    push_to_hub: bool,
    token: Any,
    save_peft_format: bool,
    commit_message: str | None = None,
    repo_id: str | None = None,
    create_pr: bool = False,
    **create: Any,
) -> None:
    state = state_of(model)
    if len(state.active) > 1:
        raise ValueError(
            "Multiple active adapters detected, saving multiple active adapters is not supported yet. You can save "
            "adapters separately one by one by iteratively calling `model.set_adapter(adapter_name)` then "
            "`model.save_pretrained(...)`"
        )
    here = saves_here(model, is_main_process)
    if state_dict is not None and not here:
        return  # one process alone may have gathered it, as accelerate's get_state_dict does
    own = state.get(only_active(model))
    adapter = held_adapter(model, own.name, state_dict)
    tensors = adapter_tensors(adapter) if save_peft_format else without_prefix(adapter)
    prefix = method_of(adapter.config).prefix
    for key, tensor in embedding_tensors(model, adapter, state_dict=state_dict).items():
        tensors[key if save_peft_format else key.removeprefix(prefix)] = tensor
    more = unfinished(adapter)
    with written(together=state_dict is None and adapter is not own):
        if not here:
            return
        folder = Path(save_directory)
        if folder.is_file():
            logger.error(f"Provided path ({save_directory}) should be a directory, not a file")
            return
        folder.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            target = hf_api().create_repo(repo_id or folder.name, exist_ok=True, token=token, **create).repo_id
            timestamps = model._get_files_timestamps(folder)
        write_unfinished(folder, more)
        checkpoint.write(folder, model, adapter.config, tensors)
        if push_to_hub:
            if not (folder / CARD).is_file():  # the user's own text stays
                create_and_tag_model_card(target, model.model_tags, token=token).save(folder / CARD)
            write_card(folder, model, adapter.config)
            model._upload_modified_files(
                folder, target, timestamps, commit_message=commit_message, token=token, create_pr=create_pr
            )
