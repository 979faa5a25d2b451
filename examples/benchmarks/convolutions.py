"""What a convolution's adapter costs per call: a slot at any rank beside the bare convolution and PEFT's exact rank.

    python examples/benchmarks/convolutions.py [--quick] [--threads 1]

Prints the machine and a Markdown table of ratios over the bare convolution, everything compiled by Inductor. All
variants of a case take their turn in each round, so that a busy machine slows all of them: a ratio is the median of the
rounds' own ratios, and behind it stands half the distance between their quartiles.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import fxpeft


@dataclass(frozen=True)
class Case:
    """One convolution, its input ``[batch, channels, size, size]``, and the ranks in use and at most."""

    channels: int
    out: int
    kernel: int
    stride: int
    size: int
    batch: int
    rank: int
    most: int

    def __str__(self) -> str:
        shape = f"{self.channels}-{self.out} {self.kernel}x{self.kernel}" + f"/{self.stride}" * (self.stride > 1)
        return f"{shape}, {self.batch} x {self.size}², rank {self.rank} in {self.most}"


CASES = [
    Case(320, 320, 3, 1, 64, 1, 16, 128),  # a UNet's
    Case(320, 320, 1, 1, 64, 1, 16, 128),
    Case(320, 320, 3, 2, 64, 1, 16, 128),
    Case(64, 64, 3, 1, 56, 4, 4, 64),  # a ResNet's
    Case(256, 256, 3, 1, 14, 4, 4, 64),
    Case(128, 256, 3, 2, 28, 4, 4, 64),
    Case(3, 64, 7, 2, 224, 1, 4, 64),
]
QUICK = [Case(32, 32, 3, 1, 16, 1, 4, 16), Case(16, 32, 3, 2, 16, 1, 4, 16)]


def bare(case: Case) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Conv2d(case.channels, case.out, case.kernel, case.stride, case.kernel // 2)
    return nn.Sequential(layer).eval().requires_grad_(False)


def prepared(case: Case, on: bool, rank: Any = "dynamic") -> nn.Module:
    """With slots, and an adapter in them."""
    model = bare(case)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=["0"]))
    fill(fxpeft.adapter_state_dict(model))
    fxpeft.prepare_hotswap(model, case.most, targets=["0"], rank=rank)
    if not on:
        fxpeft.disable_adapters(model)
    return model


def exact(case: Case) -> nn.Module:
    """PEFT's, at the adapter's own rank, which can't be swapped for another."""
    config = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=["0"])
    model = peft.get_peft_model(bare(case), config)
    fill({name: tensor for name, tensor in model.named_parameters() if "lora_" in name})
    return model.eval().requires_grad_(False)


def fill(tensors: dict[str, torch.Tensor]) -> None:
    """The same values under both libraries' names."""
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(int("lora_A" in name))
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)


def variants(case: Case) -> dict[str, Callable[[], Any]]:
    """Everything compiled, called once and compared with PEFT."""
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    wanted, runs = exact(case)(x), dict[str, Callable[[], Any]]()
    for name, model, compiler in (
        ("bare", bare(case), torch.compile),
        ("slot, on", prepared(case, True), torch.compile),
        ("slot, off", prepared(case, False), torch.compile),
        ("slot, off, `fxpeft.compile`", prepared(case, False), fxpeft.compile),
        ("slot, static rank", prepared(case, True, "static"), torch.compile),
        ("PEFT, exact rank", exact(case), torch.compile),
    ):
        run = compiler(model, fullgraph=True)
        found = run(x)
        if name != "bare" and "off" not in name:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
        runs[name] = lambda run=run: run(x)  # type: ignore[misc]
    return runs


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, variants in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def machine() -> str:
    """What ran this."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, PEFT {peft.__version__}"


@torch.no_grad()
def main(quick: bool) -> None:
    """Compile, measure and print, case by case."""
    torch._dynamo.config.recompile_limit = 64
    print(machine())
    rows: dict[str, list[str]] = {}
    cases = QUICK if quick else CASES
    for case in cases:
        torch._dynamo.reset()
        runs = variants(case)
        measure(runs, 5)
        found = measure(runs, 10 if quick else 100)
        for name, times in found.items():
            low, middle, high = statistics.quantiles(
                times if name == "bare" else [own / base for own, base in zip(times, found["bare"], strict=True)], n=4
            )
            cell = f"{middle:.2f} ms" if name == "bare" else f"{middle:.3f}x ± {(high - low) / 2:.3f}"
            rows.setdefault(name, []).append(cell)
    print("| | " + " | ".join(map(str, cases)) + " |\n|" + "---|" * (len(cases) + 1))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiny cases: a check that it runs, not a measurement")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    main(options.quick)
