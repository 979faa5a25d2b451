"""fxpeft behind diffusers' own methods for LoRAs, in the place of PEFT: install, uninstall, installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers.loaders import lora_pipeline  # noqa: F401 - all classes of pipelines with LoRAs are below one, made here
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from fxpeft.integrations.diffusers import model_methods, pipeline_methods
from fxpeft.integrations.diffusers.scales import unwatch_scales, watch_scales
from fxpeft.integrations.diffusers.together import models_of
from fxpeft.integrations.replacing import Replaced
from fxpeft.model.modules import of_peft


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield from _each(LoraBaseMixin, pipeline_methods.METHODS)
    yield from _each(PeftAdapterMixin, model_methods.METHODS)
    yield LoraBaseMixin, "__init_subclass__", classmethod(_pipeline_comes)
    for cls in _below(LoraBaseMixin):
        yield from _of_class(cls)


def _each(owner: type, methods: Sequence[Callable[..., Any]]) -> Iterator[tuple[Any, str, Any]]:
    for method in methods:
        yield owner, method.__name__, _shared(getattr(owner, method.__name__), method)


def _of_class(cls: type) -> Iterator[tuple[Any, str, Any]]:
    """What a class of pipelines has of its own."""
    own = vars(cls)
    if "load_lora_weights" in own:
        yield cls, "load_lora_weights", _shared(own["load_lora_weights"], pipeline_methods.load_lora_weights)
    if isinstance(own.get("save_lora_weights"), classmethod):
        yield cls, "save_lora_weights", pipeline_methods.SaveLoraWeights(own["save_lora_weights"])


def _pipeline_comes(cls: type[Any], /, **kwargs: Any) -> None:
    super(LoraBaseMixin, cls).__init_subclass__(**kwargs)
    _replaced.replace(list(_of_class(cls)))


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for each in cls.__subclasses__():
        yield each
        yield from _below(each)


def _shared(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, or diffusers' own where PEFT has adapted a model."""

    @functools.wraps(theirs)
    def choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [self] if isinstance(self, nn.Module) else models_of(self).values()
        of_peft_too = any(of_peft(module) for model in models for module in model.modules())
        return (theirs if of_peft_too else ours)(self, *args, **kwargs)

    return choose


_replaced = Replaced(_replacements, watch_scales, unwatch_scales)
install, uninstall, installed = _replaced.install, _replaced.uninstall, _replaced.installed
