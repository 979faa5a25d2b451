"""The private torch APIs that fxpeft uses, and nothing else. Tried on torch 2.13."""

from __future__ import annotations

from typing import Any

from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer


def import_block(names: dict[str, Any]) -> str:
    """Import statements that give the globals of a graph's generated code, for a fresh process."""
    return _format_import_block(names, sys_importer)
