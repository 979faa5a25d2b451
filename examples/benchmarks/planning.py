"""What it takes to add, plan, save, load and prepare on models of many sites, beside PEFT.

Models have tiny weights: what is measured is the work per site. Processor seconds of one thread, each step in turn with
PEFT's, the median of ``--rounds``.

    python examples/benchmarks/planning.py --models 32 80 experts --rounds 3
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": NAMES}


class Experts(nn.Module):
    """48 layers of 128 experts with three linears each: 18,432 sites."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(_expert() for _ in range(128))}) for _ in range(48)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., 4]``."""
        for layer in self.layers:
            for expert in layer["experts"]:  # type: ignore[index]
                x = x + expert["down_proj"](expert["gate_proj"](x) * expert["up_proj"](x))
        return x


def _expert() -> nn.Module:
    sizes = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def make(which: str) -> nn.Module:
    """A model of so many of Llama's layers, or of experts."""
    if which == "experts":
        return Experts()
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=int(which), num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def ours(which: str, folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """fxpeft's steps, in order."""
    model, config = make(which), fxpeft.LoraConfig(**CONFIG)
    yield "plan", lambda: fxpeft.plan(model, config)
    yield "plan, printed", lambda: str(fxpeft.plan(model, config))
    yield "add", lambda: fxpeft.add_adapter(model, config)
    yield "save", lambda: fxpeft.save_adapter(model, folder)
    yield "load", lambda: fxpeft.load_adapter(model, folder, "other")
    yield "set", lambda: fxpeft.set_adapter(model, "default")
    yield "prepare", lambda: fxpeft.prepare_hotswap(model, 16)


def theirs(which: str, folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """PEFT's, where it has such a step."""
    config, made = peft.LoraConfig(**CONFIG), make(which)
    models: list[Any] = []
    yield "add", lambda: models.append(peft.get_peft_model(made, config))  # type: ignore[arg-type]
    (model,) = models
    yield "save", lambda: model.save_pretrained(folder)
    yield "load", lambda: model.load_adapter(folder, "other")
    yield "set", lambda: model.set_adapter("default")
    model.delete_adapter("other")
    yield "prepare", lambda: prepare_model_for_compiled_hotswap(model, target_rank=16)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["32", "80", "experts"], help="layers of a Llama, or experts")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for steps in (ours, theirs):  # what is done once in a process
        with tempfile.TemporaryDirectory() as folder:
            for _, step in steps("1", folder):
                step()
    for which in options.models:
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(options.rounds):
            for name, steps in (("fxpeft", ours), ("PEFT", theirs)):
                with tempfile.TemporaryDirectory() as folder:
                    for what, step in steps(which, folder):
                        gc.collect()
                        start = time.process_time()
                        step()
                        taken[what, name].append(time.process_time() - start)
        print(f"\n| {which}, processor seconds | fxpeft | PEFT |\n|---|---|---|")
        for what in dict.fromkeys(what for what, _ in taken):
            cells = (
                f"{statistics.median(taken[what, n]):.2f}" if (what, n) in taken else "" for n in ("fxpeft", "PEFT")
            )
            print(f"| {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
