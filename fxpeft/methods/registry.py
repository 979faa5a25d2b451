"""Which methods there are. A new one is a file beside this and a line in ``METHODS``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fxpeft.errors import AdapterError, short
from fxpeft.methods.adalora import AdaLora
from fxpeft.methods.adamss import Adamss
from fxpeft.methods.alora import Alora
from fxpeft.methods.base import Method
from fxpeft.methods.bdlora import BdLora
from fxpeft.methods.beft import Beft
from fxpeft.methods.boft import Boft
from fxpeft.methods.c3a import C3A
from fxpeft.methods.cartridge import Cartridge
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.cpt import Cpt
from fxpeft.methods.deft import Deft
from fxpeft.methods.delora import Delora
from fxpeft.methods.dora import Dora
from fxpeft.methods.fourierft import FourierFT
from fxpeft.methods.glora import Glora
from fxpeft.methods.gralora import Gralora
from fxpeft.methods.hira import Hira
from fxpeft.methods.hra import Hra
from fxpeft.methods.ia3 import Ia3
from fxpeft.methods.ln_tuning import LnTuning
from fxpeft.methods.loha import LoHa
from fxpeft.methods.lokr import LoKr
from fxpeft.methods.lora import Lora
from fxpeft.methods.miss import Bat, Miss
from fxpeft.methods.multitask_prompt_tuning import MultitaskPromptTuning
from fxpeft.methods.oft import Oft
from fxpeft.methods.osf import Osf
from fxpeft.methods.p_tuning import PTuning
from fxpeft.methods.prefix_tuning import PrefixTuning
from fxpeft.methods.prompt_tuning import PromptTuning
from fxpeft.methods.psoft import Psoft
from fxpeft.methods.pvera import Pvera
from fxpeft.methods.randlora import RandLora
from fxpeft.methods.road import Road
from fxpeft.methods.shira import Shira
from fxpeft.methods.supertuning import Supertuning
from fxpeft.methods.tinylora import TinyLora
from fxpeft.methods.tokens import TrainableTokens
from fxpeft.methods.unilora import UniLora
from fxpeft.methods.vblora import VBLoRA
from fxpeft.methods.vera import Vera
from fxpeft.methods.waveft import WaveFT

METHODS: list[Method[Any]] = [
    Dora(), Alora(), BdLora(), TrainableTokens(), LnTuning(), LoHa(), LoKr(), Vera(), Bat(), Miss(), VBLoRA(), Delora(),
    Hra(), Oft(), Boft(), Beft(), Gralora(), Deft(), Hira(), C3A(), FourierFT(),
    Psoft(), Pvera(), Adamss(), UniLora(), TinyLora(), Shira(), Supertuning(), RandLora(), Road(), WaveFT(), Glora(),
    Osf(), AdaLora(), Lora(), Ia3(),
    PromptTuning(), PTuning(), MultitaskPromptTuning(), Cpt(), PrefixTuning(), Cartridge(),
]  # fmt: skip


def register(method: Method[Any]) -> None:
    """Add a method of one's own; it is asked before the ones that are there."""
    METHODS.insert(0, method)


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that a config belongs to."""
    for method in METHODS:
        if method.peft_type == config.peft_type and method.takes(config):
            return method
    raise AdapterError(f"{type(config).__name__}: no method takes it; known: {', '.join(m.name for m in METHODS)}")


def config_for(
    method: str, fields: Mapping[str, Any], *, rank: int | None = None, alpha: float | None = None
) -> AdapterConfig:
    """A method's config, by the method's name, with these fields.

    Args:
        rank, alpha: of the fields that have them in this method; its own by default.

    Raises:
        AdapterError: no such method, or field of it, the nearest is named; or a field that it needs is not there.
    """
    found = {each.name: each for each in METHODS}
    if method not in found:
        raise AdapterError(f"method: expected one of {', '.join(found)}, found {short(method)}{_near(method, found)}")
    cls, values = found[method].config_class, {**found[method].variant, **fields}
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for what, value, names in (("rank", rank, ("init_r", "r")), ("alpha", alpha, ("lora_alpha", "alpha"))):
        name = next((name for name in names if name in known), None)
        if value is not None and name is None:
            raise AdapterError(f"{what}: {method} has none; its fields are {', '.join(known)}")
        if value is not None and name is not None:
            values.setdefault(name, value)
    for name in values:
        if name not in known:
            raise AdapterError(f"{method}: it has no field {short(name)}{_near(name, known)}")
    if missing := [name for name, value in values.items() if value is ...]:
        raise AdapterError(f"{method}: expected {' and '.join(missing)}, found none")
    config: AdapterConfig = cls(**values)
    if (own := method_of(config).name) != method:
        raise AdapterError(f"{method}: {', '.join(fields)}: with these it is {own}")
    return config


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def config_class(peft_type: object, source: str) -> type[AdapterConfig]:
    """The config class of a ``peft_type`` as it stands in ``adapter_config.json``.

    Raises:
        AdapterError: no such method; the known ones are listed.
    """
    for method in METHODS:
        if peft_type in (method.peft_type, *method.older_types):
            return method.config_class
    known = ", ".join(dict.fromkeys(m.peft_type for m in METHODS))
    raise AdapterError(f"{source}: peft_type: expected one of {known}, found {peft_type!r}")


def slot_needs() -> dict[str, frozenset[str]]:
    """What ``prepare_hotswap(methods=...)`` may declare -> the slot features that it takes."""
    return {name: frozenset(needs) for m in reversed(METHODS) for name, needs in (m.needs or {m.name: ()}).items()}


def following() -> frozenset[str]:
    """Names of the methods that need the base's weights: slot values follow from them, or what no file holds."""
    return frozenset(m.name for m in METHODS if m.follows_base or m.found_in_base)
