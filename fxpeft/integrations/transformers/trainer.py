"""``Trainer`` with an adapter on a plain model: resuming and the best checkpoint, which else need PEFT's wrapper."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_peft_available

from fxpeft import checkpoint
from fxpeft.adapters import active_adapters
from fxpeft.adapters.injection import overwrite
from fxpeft.adapters.installing import replace_attached
from fxpeft.adapters.state import Adapter, declared_modules, state_of
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.integrations.transformers.held import only_active
from fxpeft.integrations.transformers.model_state import adapters_of, logger
from fxpeft.integrations.transformers.saving import ENCODER, encoder_of
from fxpeft.methods import method_of
from fxpeft.methods.prompts import PromptMethod
from fxpeft.model.wrappers import unwrap

FILES = (checkpoint.CONFIG, checkpoint.WEIGHTS)


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy a checkpoint of the active adapter into its parameters, which the optimiser holds.

    Raises:
        CheckpointError: it is not a checkpoint of this adapter; nothing was changed.
    """
    adapter = state_of(model).get(only_active(model))
    found = in_layout_of(model, checkpoint.read(folder))
    values = checkpoint.assign(model, adapter.plan, found, declared=declared_modules(model))
    encoder = encoder_of(adapter)
    if encoder:
        ((site, finished),) = values.sites.items()
        stored = _encoder_in(Path(folder), adapter, site, finished["embedding"])
        if stored is None or any(stored[key].shape != value.shape for key, value in encoder.items()):
            logger.warning(
                f"{folder} holds the finished prompt of adapter {adapter.name!r} and not the encoder that it comes out "
                "of: the prompt itself takes its place, and is what is trained from here on."
            )
            replace_attached(model, state_of(model), Adapter(adapter.name, adapter.plan, values))
            return
        values.sites[site] = stored
    overwrite(adapter, values)


def _encoder_in(folder: Path, adapter: Adapter, site: str, prompt: Tensor) -> dict[str, Tensor] | None:
    """A prompt's encoder as :data:`ENCODER` holds it; ``None`` where none is there that gives this very prompt."""
    path = folder / ENCODER
    if not path.is_file():
        return None
    stored, method = checkpoint.read_safetensors(path), method_of(adapter.config)
    assert isinstance(method, PromptMethod)
    if stored.keys() != adapter.values.sites[site].keys():
        return None
    given = method.prompt(adapter.config, adapter.plan.sites[site], stored)
    same = given.shape == prompt.shape and torch.allclose(given, prompt.cpu().to(given.dtype), atol=1e-3)
    return stored if same else None


def _adapted(trainer: Trainer, model: Any, folder: str | Path | None) -> tuple[PreTrainedModel, Path] | None:
    """The model whose active adapter a checkpoint holds, and where; ``None`` where that is Transformers' business."""
    bare = unwrap(model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if folder is None or sharded or not isinstance(bare, PreTrainedModel) or not adapters_of(bare):
        return None
    # PEFT's methods save every adapter, those that aren't called default in a folder of their name
    places = [Path(folder) / name for name in (*active_adapters(bare)[:1], "")]
    return next(((bare, place) for place in places if (place / checkpoint.WEIGHTS).is_file()), None)


def resumes_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer._load_from_checkpoint``, for adapter checkpoints too."""

    @functools.wraps(original)
    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
        adapted = _adapted(self, self.model if model is None else model, resume_from_checkpoint)
        if adapted is None:
            return original(self, resume_from_checkpoint, model)
        logger.info(f"Loading the adapter from {adapted[1]}.")
        return restore(*adapted)

    return _load_from_checkpoint


def loads_best_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer._load_best_model``, for adapter checkpoints too."""

    @functools.wraps(original)
    def _load_best_model(self: Trainer) -> Any:
        best = self.state.best_model_checkpoint
        adapted = _adapted(self, self.model, best)
        if adapted is None:
            return original(self)
        logger.info(f"Loading the best adapter from {adapted[1]} (score: {self.state.best_metric}).")
        return restore(*adapted)

    return _load_best_model


def pushes_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer._push_from_checkpoint``, which takes an adapter's files along only where PEFT is installed."""

    @functools.wraps(original)
    def _push_from_checkpoint(self: Trainer, checkpoint_folder: str) -> Any:
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if pushes and not is_peft_available() and _adapted(self, self.model, checkpoint_folder) is not None:
            for name in FILES:
                shutil.copy(Path(checkpoint_folder) / name, Path(str(self.args.output_dir)) / name)
        return original(self, checkpoint_folder)

    return _push_from_checkpoint
