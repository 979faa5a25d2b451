"""CUDA graphs: what was recorded once reads slots that never move, so its outputs follow every swap."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import fxpeft
from fxpeft.passes.torch_private import cudagraph_skips
from fxpeft.tools.gpu_check.check import Check, Setting
from fxpeft.tools.gpu_check.models import llama, logits, pointers, served


def reduce_overhead(setting: Setting) -> dict[str, Any]:
    """``mode="reduce-overhead"``, the rank in use a size, which records a graph for each rank, or fixed."""
    seen: dict[str, Any] = {}
    for rank in ("dynamic", "static"):
        torch.compiler.reset()
        skipped = cudagraph_skips()
        with served(setting, rank=rank) as each:
            compiled = torch.compile(each.model, mode="reduce-overhead", fullgraph=True)
            for name in (*each.folders, *each.folders):  # warms up, records, and replays
                each.show(name)
                each.outputs.expect(logits(compiled, each.ids), name, f"{rank} rank, {name}")
            seen[f"swaps, {rank} rank"] = each.walk(compiled, rounds=3)
        if setting.kind == "cuda" and cudagraph_skips() != skipped:
            raise AssertionError(f"{rank} rank: Inductor made no CUDA graph of {cudagraph_skips() - skipped} graphs")
    return seen


@torch.no_grad()
def cuda_graph(setting: Setting) -> dict[str, Any]:
    """``torch.cuda.graph`` of the eager forward, replayed under ``fxpeft.hold`` after each swap."""
    with served(setting, rank="static") as each:
        before, ids = pointers(each.model), each.ids
        side = setting.module.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                each.model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with fxpeft.hold(each.model), torch.cuda.graph(graph):
            output = each.model(input_ids=ids, use_cache=False).logits
        swaps = 0
        for name in [*each.outputs.wanted, *reversed(each.outputs.wanted)]:
            each.show(name)
            with fxpeft.hold(each.model):
                graph.replay()
                found = output.clone()
            each.outputs.expect(found, name, f"replayed after {name}")
            swaps += 1
        held = next(iter(each.folders))
        for name in each.folders:
            each.show(held)
            fxpeft.hotswap(each.model, each.folders[name], held)
            with fxpeft.hold(each.model):
                graph.replay()
                found = output.clone()
            each.outputs.expect(found, name, f"replayed after {name} from its folder")
            swaps += 1
        if pointers(each.model) != before:
            raise AssertionError("slots moved in memory")
    return {"swaps": swaps}


@torch.no_grad()
def generated(setting: Setting) -> dict[str, Any]:
    """``generate`` with a static cache, whose decode step transformers compiles on a GPU; greedy tokens, in float32."""
    options: dict[str, Any] = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0,
    }  # fmt: skip
    with served(setting, make=partial(llama, setting, torch.float32)) as each:
        wanted = {}
        for name, folder in each.folders.items():
            fresh = llama(setting, torch.float32)
            fxpeft.load_adapter(fresh, folder)
            wanted[name] = fresh.generate(each.ids, **options)
        for name in (*each.folders, *each.folders):
            each.show(name)
            found = each.model.generate(each.ids, cache_implementation="static", **options)
            if not torch.equal(found, wanted[name]):
                raise AssertionError(f"{name}: expected the tokens {wanted[name].tolist()}, found {found.tolist()}")
    return {"tokens": 6 * len(each.ids) * 2 * len(wanted)}


CHECKS = (
    Check(
        "reduce-overhead",
        'With `mode="reduce-overhead"` CUDA graphs are made, slots never move, and outputs follow swaps.',
        reduce_overhead,
        limit=120,
    ),
    Check(
        "cuda-graph", "A CUDA graph recorded once gives each adapter's output after each swap.", cuda_graph, on="cuda"
    ),
    Check(
        "generate",
        "`generate` with a static cache gives the training subgraph's tokens after each swap.",
        generated,
        limit=120,
    ),
)
