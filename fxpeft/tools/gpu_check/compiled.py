"""Compiled models: one graph for every swap, in each way of compiling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import fxpeft
from fxpeft.testing import count_graphs
from fxpeft.tools.gpu_check.check import Check, Setting
from fxpeft.tools.gpu_check.methods import CASES, PROMPTS
from fxpeft.tools.gpu_check.models import llama, logits, served


def whole(setting: Setting, **options: Any) -> dict[str, Any]:
    """``torch.compile(model)``."""
    torch.compiler.reset()
    with served(setting) as each, count_graphs() as counted:
        compiled = torch.compile(each.model, fullgraph=True, **options)
        swaps = each.walk(compiled)
    return {"graphs": counted.graphs, "swaps": swaps, "error": f"{each.outputs.worst:.1g}"}


def methods(setting: Setting) -> dict[str, Any]:
    """Slots for all methods but prompts at once, and an adapter of each in turn."""
    torch.compiler.reset()
    names = [name for name in CASES if name not in PROMPTS]
    configs = {name: CASES[name]() for name in names}
    with served(setting, configs, methods=tuple(names)) as each, count_graphs() as counted:
        compiled = torch.compile(each.model, fullgraph=True)
        swaps = each.walk(compiled, rounds=1)
    if counted.graphs != 1:
        raise AssertionError(f"expected one graph, found {counted.graphs}")
    return {"graphs": counted.graphs, "swaps": swaps, "error": f"{each.outputs.worst:.1g}"}


def layers(setting: Setting) -> dict[str, Any]:
    """``layer.compile()`` for each: all run the same graph."""
    torch.compiler.reset()
    with served(setting, make=partial(llama, setting, layers=3)) as each, count_graphs() as counted:
        for layer in each.model.model.layers:
            layer.compile(fullgraph=True)
        swaps = each.walk(each.model)
    if counted.graphs != 1:
        raise AssertionError(f"expected one graph for all layers, found {counted.graphs}")
    return {"graphs": counted.graphs, "swaps": swaps}


def folded(setting: Setting) -> dict[str, Any]:
    """Fold, refold in a compiled graph, and back bit for bit."""
    torch.compiler.reset()
    with served(setting) as each:
        weights = {name: p.detach().clone() for name, p in each.model.named_parameters()}
        plain = llama(setting)
        for name, folder in each.folders.items():
            fxpeft.load_adapter(plain, folder, name)
        compiled = torch.compile(plain, fullgraph=True)
        for name in (*each.folders, *each.folders):
            fxpeft.refold(plain, name)
            each.outputs.expect(logits(compiled, each.ids), name, f"refold({name})")
        fxpeft.unfold(plain)
        fxpeft.remove(plain)
        if moved := [name for name, p in plain.named_parameters() if not torch.equal(p, weights[name])]:
            raise AssertionError(f"not the weights of before: {', '.join(moved)}")
    return {"folds": 2 * len(each.folders), "error": f"{each.outputs.worst:.1g}"}


CHECKS = (
    Check("compiled", "One compiled graph serves every adapter, rank and off; nothing recompiles.", whole, limit=90),
    Check("compiled-methods", "One compiled graph serves an adapter of each method in turn.", methods, limit=120),
    Check("compiled-layers", "Layers compiled one by one share one graph, and swaps reach it.", layers, limit=90),
    Check(
        "fold",
        "Folded weights give the adapter's output, also in a compiled graph, and unfold bit for bit.",
        folded,
        limit=90,
    ),
)
# it tries many kernels, so it comes last
SLOW = (
    Check(
        "max-autotune",
        'With `mode="max-autotune"` every swap is seen and nothing recompiles.',
        partial(whole, mode="max-autotune"),
        limit=150,
    ),
)
