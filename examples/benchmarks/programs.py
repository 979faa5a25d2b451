"""Packages and the backend: swap time, latency beside the live model, the cost of slots that are off.

    python examples/benchmarks/programs.py [--hidden 512] [--layers 4]

Prints Markdown tables. Latencies are medians of interleaved repeats: in each round all variants take
their turn, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxpeft

RANK, MAX_RANK, ROUNDS = 16, 128, 30
TARGETS = ["q", "k", "v", "o", "up", "down"]


class Block(nn.Module):
    """A transformer block of the usual proportions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, hidden]``."""
        h = self.first(x)
        q, k, v = (f(h).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def make(hidden: int, layers: int) -> nn.Module:
    """The bare model."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(hidden) for _ in range(layers))).eval().requires_grad_(False)


def adapter(folder: Path, model: nn.Module, rank: int = RANK) -> Path:
    """A random adapter on all linear layers."""
    model = copy.deepcopy(model)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=rank, lora_alpha=24, target_modules=TARGETS))
    for tensor in fxpeft.adapter_state_dict(model).values():
        tensor.data.normal_(std=0.02)
    fxpeft.save_adapter(model, folder)
    return folder


def milliseconds(variants: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 3):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number >= 3:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def table(title: str, found: dict[str, float], base: str) -> None:
    """A Markdown table with ratios to one of the rows."""
    print(f"\n| {title} | ms | |\n|---|---|---|")
    for name, taken in found.items():
        print(f"| {name} | {taken:.2f} | {taken / found[base]:.2f}x |")


@torch.no_grad()
def main(hidden: int, layers: int, length: int) -> None:
    """Compile everything once, check that all variants agree, then measure."""
    x = torch.randn(1, length, hidden)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bare = make(hidden, layers)
        folders = [adapter(root / f"adapter{i}", bare) for i in range(2)]

        def prepared() -> nn.Module:
            model = copy.deepcopy(bare)
            fxpeft.prepare_hotswap(model, MAX_RANK, targets=TARGETS)
            fxpeft.load_adapter(model, folders[0], "a")
            fxpeft.load_adapter(model, folders[1], "b")
            return model

        live, plain = prepared(), prepared()
        packages = {}
        for rank in ("dynamic", "static"):
            start = time.perf_counter()
            options: Any = {"max_rank": MAX_RANK, "targets": TARGETS, "rank": rank}
            path = fxpeft.package(bare, root / f"{rank}.pt2", (x,), **options)
            size = path.stat().st_size / 1e6
            print(f"package, {rank} rank: {time.perf_counter() - start:.0f} s, {size:.0f} MB", flush=True)
            packages[rank] = fxpeft.open_package(path)
            for name_, folder in zip("ab", folders, strict=True):
                packages[rank].load_adapter(folder, name_)
        runs: dict[str, Callable[[], Any]] = {}
        compiled = {"bare": torch.compile(bare), "slots": torch.compile(plain), "folded": fxpeft.compile(live)}
        wanted = plain(x)
        runs["bare model, compiled"] = lambda: compiled["bare"](x)
        runs["live model with slots, compiled"] = lambda: compiled["slots"](x)
        runs["package, dynamic rank"] = lambda: packages["dynamic"](x)
        runs["package, static rank"] = lambda: packages["static"](x)
        for variant, run in list(runs.items())[1:]:
            torch.testing.assert_close(run(), wanted, rtol=0, atol=1e-3, msg=lambda m, v=variant: f"{v}: {m}")
        title = f"rank {RANK} of {MAX_RANK}, hidden {hidden}, {length} tokens"
        table(title, milliseconds(runs), "bare model, compiled")

        for model in (live, plain):
            compiled["folded"](x)
            fxpeft.disable_adapters(model)
        torch.testing.assert_close(compiled["folded"](x), bare(x), rtol=0, atol=1e-3)
        idle = {
            "bare model": lambda: compiled["bare"](x),
            "slots off, torch.compile": lambda: compiled["slots"](x),
            "slots off, fxpeft.compile": lambda: compiled["folded"](x),
        }
        table("idle cost", milliseconds(idle), "bare model")

        for model in (live, plain):
            fxpeft.enable_adapters(model)
        other = fxpeft.open_package(root / "dynamic.pt2")  # what is hot swapped and set again at once is settled first
        other.load_adapter(folders[0], "a")
        turns = [iter(range(10**9)) for _ in range(4)]
        swaps = {
            "live model, set_adapter": lambda: fxpeft.set_adapter(plain, "ab"[next(turns[0]) % 2]),
            "package, set_adapter": lambda: packages["dynamic"].set_adapter("ab"[next(turns[1]) % 2]),
            "live model, hotswap from a folder": lambda: fxpeft.hotswap(live, folders[next(turns[2]) % 2], "a"),
            "package, hotswap from a folder": lambda: other.hotswap(folders[next(turns[3]) % 2], "a"),
        }
        fxpeft.set_adapter(live, "a")
        table("swap", milliseconds(swaps), "live model, set_adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    main(options.hidden, options.layers, options.length)
