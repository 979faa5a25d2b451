"""A model of a folder or hub id: its structure on the meta device, or with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from fxpeft.errors import AdapterError


def _class_of(source: str) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise AdapterError(f"{source}: expected a model's folder or hub id, found none to read: {first}") from None
    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, None), config


def model_config(source: str | Path) -> Any:
    """The model's config alone.

    Raises:
        AdapterError: there is no model.
    """
    return _class_of(str(source))[1]


def empty_model(source: str | Path) -> PreTrainedModel:
    """The model's structure on the meta device; only ``config.json`` is read.

    Raises:
        AdapterError: there is no model.
    """
    with torch.device("meta"):
        return loaded_model(source, random=True)


def loaded_model(source: str | Path, *, random: bool = False) -> PreTrainedModel:
    """The model with its weights, or with random ones.

    Raises:
        AdapterError: there is no model, or it has no weights.
    """
    cls, config = _class_of(str(source))
    model: PreTrainedModel
    if random:
        model = AutoModel.from_config(config) if cls is None else cls(config)  # type: ignore[no-untyped-call]
    else:
        try:
            model = (AutoModel if cls is None else cls).from_pretrained(str(source))
        except OSError as error:
            raise AdapterError(f"{source}: has no weights that can be read: {str(error).splitlines()[0]}") from None
    return model.train(False)  # type: ignore[no-any-return]
