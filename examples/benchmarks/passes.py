"""What each graph pass of ``fxpeft.compile`` is worth: latency with it and without it, in one run.

    python examples/benchmarks/passes.py [--hidden 1024 2048] [--tokens 1 64 512] [--layers 2]

Prints a Markdown table of ratios over the bare model, compiled. Everything is compiled first; then all variants
take their turn in each round, so that a busy machine slows all of them, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from programs import milliseconds
from torch import Tensor, nn

import fxpeft

RANK, MAX_RANK, ROUNDS = 16, 128, 40
TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]
ACTIVE: dict[str, Sequence[str]] = {"no pass": (), "`clean`": ("clean",), "`group`": ("group", "clean")}
IDLE: dict[str, Sequence[str]] = {"no pass": (), "`fold_inactive`": ("fold_inactive", "clean")}


class Block(nn.Module):
    """A Llama's block: three projections read one input, two another."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, 8 * hidden // 3, bias=False) for _ in range(2))
        self.down = nn.Linear(8 * hidden // 3, hidden, bias=False)
        self.first, self.second = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, hidden]``."""
        h = self.first(x)
        q, k, v = (f(h).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def make(hidden: int, layers: int) -> nn.Module:
    """The bare model."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(hidden) for _ in range(layers))).eval().requires_grad_(False)


def prepared(bare: nn.Module, on: bool) -> nn.Module:
    """A model on the bare one's own weights, with slots and an adapter on all linear layers."""
    model = copy.deepcopy(bare, {id(p): p for p in bare.parameters()})
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=RANK, lora_alpha=24, target_modules=TARGETS))
    for tensor in fxpeft.adapter_state_dict(model).values():
        tensor.data.normal_(std=0.02)
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=TARGETS)
    if not on:
        fxpeft.disable_adapters(model)
    return model


def compiled(hidden: int, tokens: int, layers: int) -> dict[str, Callable[[], Any]]:
    """Every variant, compiled, called once and checked."""
    bare, x = make(hidden, layers), torch.randn(1, tokens, hidden)
    first = torch.compile(bare, fullgraph=True)
    first(x)
    runs: dict[str, Callable[[], Any]] = {"bare": lambda: first(x)}
    for state, variants in (("on", ACTIVE), ("off", IDLE)):
        for name, passes in variants.items():
            model = prepared(bare, state == "on")
            run = fxpeft.compile(model, passes=passes, fullgraph=True)
            torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-3)
            runs[f"adapter {state}, {name}"] = lambda run=run: run(x)  # type: ignore[misc]
    return runs


@torch.no_grad()
def main(hiddens: list[int], lengths: list[int], layers: int) -> None:
    """Compile everything, then measure."""
    torch._dynamo.config.recompile_limit = 64
    runs = {(h, n): compiled(h, n, layers) for h in hiddens for n in lengths}
    found = {case: milliseconds(each, ROUNDS if case[1] > 64 else 4 * ROUNDS) for case, each in runs.items()}
    print("| hidden, tokens | " + " | ".join(f"{h}, {n}" for h, n in found) + " |\n|---|" + "---|" * len(found))
    for name in next(iter(found.values())):
        taken = [(each[name], each["bare"]) for each in found.values()]
        cells = [f"{own:.2f} ms" if name == "bare" else f"{own / bare:.3f}x" for own, bare in taken]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    main(options.hidden, options.tokens, options.layers)
