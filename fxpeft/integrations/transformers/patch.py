"""fxpeft behind Transformers' own adapter methods, in the place of PEFT: install, uninstall, installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import transformers.integrations.peft
import transformers.models.auto.auto_factory
import transformers.pipelines
from transformers import PreTrainedModel, Trainer
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from fxpeft.integrations import accelerate, trl
from fxpeft.integrations.replacing import Replaced
from fxpeft.integrations.transformers import loading, model_methods, saving, trainer
from fxpeft.integrations.transformers.releases import LOCAL_SUBFOLDERS, find_adapter_config


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    for name, member in model_methods.members().items():
        yield PreTrainedModel, name, member
    yield PreTrainedModel, "save_pretrained", saving.saves_adapter(PreTrainedModel.save_pretrained)
    autos = (value for value in vars(modeling_auto).values() if isinstance(value, type))
    # each Auto class has a copy of its own
    for owner in (PreTrainedModel, _BaseAutoModelClass, *(a for a in autos if issubclass(a, _BaseAutoModelClass))):
        if isinstance(vars(owner).get("from_pretrained"), classmethod):
            yield owner, "from_pretrained", classmethod(_finds_adapter(vars(owner)["from_pretrained"].__func__))
    # these three ask it only whether to look for an adapter_config.json; Trainer's, which also imports PEFT, stays
    for module in (
        transformers.integrations.peft, transformers.models.auto.auto_factory, transformers.pipelines
    ):  # fmt: skip
        yield module, "is_peft_available", _yes
        if not LOCAL_SUBFOLDERS:
            yield module, "find_adapter_config_file", find_adapter_config
    yield Trainer, "_load_from_checkpoint", trainer.resumes_adapter(Trainer._load_from_checkpoint)
    yield Trainer, "_load_best_model", trainer.loads_best_adapter(Trainer._load_best_model)
    yield Trainer, "_push_from_checkpoint", trainer.pushes_adapter(Trainer._push_from_checkpoint)
    yield Trainer, "__init_subclass__", classmethod(_trainer_comes)
    yield from trl.replacements()
    yield from accelerate.replacements()


def _trainer_comes(cls: type[Any], /, **kwargs: Any) -> None:
    """A class of trainers is made, as its module is imported: all that this has imported itself is there."""
    super(Trainer, cls).__init_subclass__(**kwargs)
    _replaced.replace(list(trl.replacements([cls.__module__])))


def _finds_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = loading.split_adapter_kwargs(pretrained_model_name_or_path, kwargs)
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def _yes() -> bool:
    return True


_replaced = Replaced(_replacements)
install, uninstall, installed = _replaced.install, _replaced.uninstall, _replaced.installed
