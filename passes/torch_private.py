"""The private torch APIs that fxpeft uses, and nothing else. Tried on torch 2.13."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer


def import_block(names: dict[str, Any]) -> str:
    """Import statements that give the globals of a graph's generated code, for a fresh process."""
    return _format_import_block(names, sys_importer)


def copy_all(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """``destination.copy_(source)`` for all pairs; shapes must be equal.

    On a CPU a single copy of an adapter's factor is too small to be split over threads, so the list
    is: torch releases the interpreter's lock while it copies.
    """
    if not destinations:
        return
    count = len(destinations)
    parts = min(torch.get_num_threads(), count) if destinations[0].device.type == "cpu" and count >= 32 else 1
    bounds = [count * i // parts for i in range(parts + 1)]
    spans = [(destinations[a:b], sources[a:b]) for a, b in pairwise(bounds)]
    running = [_copiers().submit(torch._foreach_copy_, *span) for span in spans[1:]]
    try:
        torch._foreach_copy_(*spans[0])
    finally:
        wait(running)
    for part in running:
        part.result()


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="fxpeft-copy")
