"""``fxpeft.install("diffusers")``: fxpeft behind another library's own adapter methods, in the place of PEFT."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

from fxpeft.errors import AdapterError

Library: TypeAlias = Literal["transformers", "diffusers"]


def install(library: Library = "transformers") -> None:
    """Let a library's adapter methods run on fxpeft, without PEFT. Calling it twice is calling it once.

    ``"transformers"``: every ``PreTrainedModel``, made before or after, then has ``add_adapter``, ``load_adapter``,
    ``set_adapter``, ``enable_peft_hotswap`` and the others; ``from_pretrained`` and ``pipeline`` take an adapter's
    folder or id, ``save_pretrained`` and ``push_to_hub`` write the adapter alone, and ``Trainer`` resumes from it.
    Signatures, return values and errors are those of transformers 5.23 and 5.24, whose integrations differ in the PEFT
    that they ask for alone. TRL's trainers treat such models as PEFT's, and take fxpeft's configs as ``peft_config``;
    accelerate's FSDP checkpoints hold the adapters alone where ``Trainer`` asks for that.

    ``"diffusers"``: the same of pipelines (``load_lora_weights``, ``hotswap=True`` too, ``set_adapters``,
    ``fuse_lora``, ``enable_lora_hotswap``, ...) and of their models; all components change together, or none does.

    Models that PEFT itself has adapted are left to PEFT.

    Raises:
        AdapterError: another library. ImportError: it isn't there.
    """
    _of(library).install()


def uninstall(library: Library = "transformers") -> None:
    """Give a library back what :func:`install` replaced. Adapters stay on their models, for fxpeft's functions."""
    _of(library).uninstall()


@contextmanager
def installed(library: Library = "transformers") -> Iterator[None]:
    """Let a library run on fxpeft (:func:`install`) inside a ``with`` block; then as before, installed or not."""
    with _of(library).installed():
        yield


def _of(library: str) -> Any:
    if library not in get_args(Library):
        raise AdapterError(f"install: expected one of {', '.join(get_args(Library))}, found {library!r}")
    return importlib.import_module(f"fxpeft.integrations.{library}.patch")
