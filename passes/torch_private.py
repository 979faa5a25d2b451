"""The private torch APIs that fxpeft uses, and nothing else. Tried on torch 2.13."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer


def import_block(names: dict[str, Any]) -> str:
    """Import statements that give the globals of a graph's generated code, for a fresh process."""
    return _format_import_block(names, sys_importer)


def copy_all(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """``destination.copy_(source)`` for all pairs in one call; shapes must be equal."""
    if destinations:
        torch._foreach_copy_(list(destinations), list(sources))
