"""Parameter-efficient fine-tuning as a graph-rewriting compiler pass."""

import ast as _ast
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import Any as _Any

from fxpeft.moved import find_old_paths as _find_old_paths

# name -> the package that it is taken from, by the stub beside this file
_HOMES = {
    alias.name: node.module
    for node in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text("utf-8")).body
    if isinstance(node, _ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = sorted(_HOMES)
__version__ = _version("fxpeft")
_find_old_paths()


def __getattr__(name: str) -> _Any:
    # on first use: pytest imports this package in every run, for its plugin, and torch takes seconds
    if name not in _HOMES:
        raise AttributeError(f"module 'fxpeft' has no attribute {name!r}")
    value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
