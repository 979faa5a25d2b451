"""A quick measurement on one's own model: forwards with and without an adapter, and a swap."""

from __future__ import annotations

import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.errors import AdapterError
from fxpeft.model.empty import loaded_model
from fxpeft.model.trace import example_inputs
from fxpeft.testing import count_graphs

NAMES = ("first", "second")


@dataclass(frozen=True)
class Measured:
    """Medians in milliseconds: ``base``, ``adapter`` (a forward), ``swap``. ``graphs``: captured after the warm-up."""

    milliseconds: dict[str, float]
    sites: int
    graphs: int
    device: str


def measure(
    source: str,
    *,
    target: str,
    rank: int,
    max_rank: int,
    batch: int,
    length: int,
    rounds: int,
    compiled: bool,
    random: bool,
) -> Measured:
    """Measure ``source``, a folder or hub id; in each round every variant takes its turn.

    Raises:
        AdapterError: no such model, no such targets, or a rank above ``max_rank``.
    """
    if rank > max_rank:
        raise AdapterError(f"rank: expected at most max_rank {max_rank}, found {rank}")
    base = loaded_model(source, random=random).requires_grad_(False)
    model = copy.deepcopy(base)
    fxpeft.prepare_hotswap(model, max_rank, targets=target)
    config = fxpeft.LoraConfig(r=rank, lora_alpha=rank, target_modules=target)
    for name in NAMES:
        fxpeft.add_adapter(model, config, name)
    inputs = _inputs(base, batch, length)
    runs: dict[str, Any] = {"base": base, "adapter": model}
    if compiled:
        runs = {name: torch.compile(each) for name, each in runs.items()}
    timed: dict[str, list[float]] = {name: [] for name in (*runs, "swap")}
    with torch.no_grad():
        for name in NAMES:  # warm: both adapters, so that nothing is left to compile
            fxpeft.set_adapter(model, name)
            for _ in range(2):
                for forward in runs.values():
                    forward(**inputs)
        with count_graphs() as counted:
            for turn in range(rounds):
                for name, forward in list(runs.items())[:: 1 if turn % 2 else -1]:
                    timed[name].append(_time(functools.partial(forward, **inputs)))
                timed["swap"].append(_time(functools.partial(fxpeft.set_adapter, model, NAMES[turn % 2])))
    sites = len(state_of(model).adapters[NAMES[0]].plan.sites)
    medians = {name: 1000 * statistics.median(values) for name, values in timed.items()}
    return Measured(medians, sites, counted.graphs, platform.processor() or platform.machine())


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    inputs = example_inputs(model) or {}
    ids = {k for k in inputs if k.endswith("input_ids")}
    sized = {k: torch.zeros(batch, length, dtype=torch.long) for k in ids}
    rest = {
        k: torch.zeros(batch, *v.shape[1:], dtype=v.dtype) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
        if k not in ids
    }
    return {**rest, **sized}


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
