"""How long rewriting a captured program takes: an adapter, or slots, into it and out again.

    python examples/benchmarks/rewriting.py [--sites 1000] [--rounds 3]

Prints a Markdown table of medians. All steps take their turn in each round, so that a slow minute of the machine
meets all of them. The program is a chain of small linears: what is measured is the graph, not its tensors.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
from torch import nn

import fxpeft

SIZE, RANK, MAX_RANK = 6, 2, 8
TARGETS = r"\d+"


def programs(sites: int) -> dict[str, Any]:
    """One chain of linears, captured in three ways."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(sites))).eval().requires_grad_(False)
    exported = torch.export.export(model, (torch.randn(2, SIZE),))
    return {
        "exported": exported,
        "exported, inference IR": exported.run_decompositions(),
        "torch.fx": torch.fx.symbolic_trace(model),
    }


def main(sites: int, rounds: int) -> None:
    """Each program, rewritten and ejected in turn."""
    config = fxpeft.LoraConfig(r=RANK, lora_alpha=3, target_modules=TARGETS)
    slots = fxpeft.Slots(TARGETS, max_rank=MAX_RANK)
    taken: dict[tuple[str, str], list[float]] = {}
    captured = programs(sites)
    for _ in range(rounds):
        for name, program in captured.items():
            for what, adapter in (("LoRA", config), ("slots", slots)):
                start = time.perf_counter()
                rewritten = fxpeft.rewrite(program, adapter)
                between = time.perf_counter()
                fxpeft.eject(rewritten)
                taken.setdefault((name, f"{what}, rewrite"), []).append(between - start)
                taken.setdefault((name, f"{what}, eject"), []).append(time.perf_counter() - between)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads of "
          f"{platform.processor() or platform.machine()}, {rounds} rounds")  # fmt: skip
    steps = list(dict.fromkeys(step for _, step in taken))
    print(f"\n| {sites} sites, seconds | {' | '.join(steps)} |\n|---|{'---|' * len(steps)}")
    for name in captured:
        print(f"| {name} | {' | '.join(f'{statistics.median(taken[name, step]):.2f}' for step in steps)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    main(options.sites, options.rounds)
