"""Which names an adapter can have: one function, which every entry that takes a name uses."""

from __future__ import annotations

import keyword
import re

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.passes.container import RESERVED, Container

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
_ATTRIBUTES = frozenset(vars(nn.Module()))


def check_adapter_name(name: object) -> str:
    """``name`` where it can be an adapter's: a part of parameters' dotted names, and no code whatever prints it.

    Raises:
        AdapterError: it is something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name) if len(repr(name)) <= 160 else f"{repr(name)[:150]}..."
        raise AdapterError(
            f"adapter name {shown}: expected 1 to 128 of the characters A-Z, a-z, 0-9, _ and -, the first one no -"
        )
    if keyword.iskeyword(name) or hasattr(Container, name) or name in _ATTRIBUTES:
        raise AdapterError(f"adapter name {name!r}: expected no attribute of nn.Module and no Python keyword")
    if RESERVED.fullmatch(name):
        raise AdapterError(f"adapter name {name!r}: generated code calls the active adapters so; expected another one")
    return name
