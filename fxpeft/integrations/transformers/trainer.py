"""``Trainer`` with an adapter on a plain model: resuming and the best checkpoint, which else need PEFT's wrapper."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_peft_available

from fxpeft import checkpoint
from fxpeft.adapters import active_adapters
from fxpeft.adapters.injection import overwrite
from fxpeft.adapters.installing import replace_attached
from fxpeft.adapters.loading import load
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.integrations.transformers.held import only_active
from fxpeft.integrations.transformers.model_state import adapters_of, logger
from fxpeft.integrations.transformers.saving import UNFINISHED, unfinished
from fxpeft.methods import method_of
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.model.wrappers import unwrap

FILES = (checkpoint.CONFIG, checkpoint.WEIGHTS)


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy a checkpoint of the active adapter into its parameters, which the optimiser holds.

    Raises:
        CheckpointError: it is not a checkpoint of this adapter; nothing was changed.
    """
    adapter = state_of(model).get(only_active(model))
    _, values = load(Modules(unwrap(model)), checkpoint.read(folder), plan=adapter.plan)
    if before := unfinished(adapter):
        sites = _resumed(Path(folder), adapter, before, values)
        if sites is None:
            logger.warning(
                f"{folder} holds the finished {method_of(adapter.config).alone or 'values'} of adapter "
                f"{adapter.name!r} and not what it comes out of: the finished one takes its place, and is what is "
                "trained from here on."
            )
            replace_attached(model, state_of(model), Adapter(adapter.name, adapter.plan, values))
            return
        values.sites = sites
    overwrite(adapter, values)


def _resumed(
    folder: Path, adapter: Adapter, before: dict[str, Tensor], values: Values
) -> dict[str, dict[str, Tensor]] | None:
    """The sites as :data:`UNFINISHED` holds them; ``None`` where none is there that gives these very values."""
    path = folder / UNFINISHED
    stored = checkpoint.read_safetensors(path) if path.is_file() else {}
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in before.items()}:
        return None
    return method_of(adapter.config).resume(adapter.config, adapter.plan.sites, stored, values.sites)


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
