"""What training an adapter keeps and takes: bytes saved for the backward pass, peak memory and step time.

fxpeft beside PEFT and the bare model, whose weights are frozen and whose gradient goes to its input embeddings.
Adapters are float32, on a Llama of random weights. Saved bytes are those of distinct memory that autograd holds after
the forward, beside parameters and buffers. Peak memory is a step's above what was there before it, in a process of its
own (of the process on a CPU, with its allocator told to give memory back; of torch's allocator on a GPU). Times are
interleaved, medians with half the interquartile range.

    python examples/benchmarks/training.py --quick
    python examples/benchmarks/training.py --threads 1 --json results/training.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fxpeft

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": NAMES}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", LORA),
    "LoRA, dropout": ("LoraConfig", {**LORA, "lora_dropout": 0.1}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "DoRA, dropout": ("LoraConfig", {**LORA, "use_dora": True, "lora_dropout": 0.1}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 16, "lora_alpha": 32, "target_modules": NAMES, "total_step": 1000}),
    "IA3": ("IA3Config", IA3),
    "LoRA, experts": ("LoraConfig", {"r": 16, "target_modules": [], "target_parameters": EXPERTS}),  # of a Mixtral
}
VARIANTS = ("bare", "fxpeft", "PEFT")


class Step(nn.Module):
    """A model and its loss as one module, so that both are compiled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(inputs_embeds=embeddings, labels=labels).loss
        return loss


class Case:
    """One model, ready to step.

    Args:
        options: the command line's. variant: one of ``VARIANTS``. method: one of ``METHODS``.
    """

    def __init__(self, options: argparse.Namespace, variant: str, method: str, dtype: str, compiled: bool) -> None:
        torch.manual_seed(0)
        size = options.hidden
        shape: dict[str, Any] = {
            "vocab_size": 512, "hidden_size": size, "intermediate_size": size * 11 // 4, "num_attention_heads": 16,
            "num_hidden_layers": options.layers, "num_key_value_heads": 16, "max_position_embeddings": options.tokens,
            "tie_word_embeddings": False,
        }  # fmt: skip
        name, settings = METHODS[method]
        base: Any
        if "target_parameters" in settings:
            base = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2))
        else:
            base = LlamaForCausalLM(LlamaConfig(**shape))
        base.to(options.device, getattr(torch, dtype)).requires_grad_(False)
        if variant == "fxpeft":
            fxpeft.add_adapter(base, getattr(fxpeft, name)(**settings))
        elif variant == "PEFT":
            base = peft.get_peft_model(base, getattr(peft, name)(**settings))
        base.train()
        trained = [(n, p) for n, p in base.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for n, p in trained:
                if "lora_B" in n or "lora_E" in n:
                    p.normal_(std=0.02)
        self.own = [*base.parameters(), *base.buffers()]
        self.optimiser = torch.optim.AdamW([p for _, p in trained], lr=1e-4) if trained else None
        self.clock = time.process_time if options.processor_time else time.perf_counter
        self.labels = torch.randint(0, 512, (1, options.tokens), device=options.device)
        self.embeddings = torch.randn(1, options.tokens, size, device=options.device, dtype=getattr(torch, dtype))
        self.embeddings.requires_grad_()
        step = Step(base)
        self.loss: Callable[..., Tensor] = torch.compile(step) if compiled else step

    def step(self) -> None:
        """Forward, backward, and the optimiser's step."""
        self.loss(self.embeddings, self.labels).backward()
        self.embeddings.grad = None
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()

    def saved(self) -> int:
        """Bytes that autograd holds for the backward pass, beside the model's own and the inputs."""
        given = (*self.own, self.labels, self.embeddings)
        own = {t.untyped_storage().data_ptr() for t in given}
        found: dict[int, int] = {}
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)  # so that no later one has its address
            return tensor

        if isinstance(self.loss, Step):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self.loss(self.embeddings, self.labels)
        else:  # a hook would be compiled too
            waiting: list[Any] = [self.loss(self.embeddings, self.labels).grad_fn]
            seen = set()
            while waiting:
                node = waiting.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    waiting += [n for n, _ in node.next_functions]
                    for tensor in getattr(node, "saved_tensors", ()):
                        if isinstance(tensor, Tensor):
                            keep(tensor)
        return sum(found.values())

    def peak(self) -> int:
        """Bytes of one step's peak above what is held between steps."""
        for _ in range(2):
            self.step()
        if self.embeddings.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        status = Path("/proc/self/status")
        if not status.exists():
            return 0

        def kilobytes(key: str) -> int:
            return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is what is held now
        before = kilobytes("VmRSS")
        self.step()
        return 1024 * (kilobytes("VmHWM") - before)

    def seconds(self) -> float:
        """Of one step."""
        start = self.clock()
        self.step()
        if self.embeddings.is_cuda:
            torch.cuda.synchronize()
        return self.clock() - start


def memory(argv: list[str], variant: str, method: str, dtype: str, mode: str) -> dict[str, int]:
    """Saved bytes and the peak of one case, in a process of its own."""
    one = json.dumps([variant, method, dtype, mode])
    # glibc gives memory back at once, so that what the process holds is what torch holds
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--one", one], capture_output=True, text=True, env=environment, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(options: argparse.Namespace, method: str, dtype: str, mode: str) -> dict[str, tuple[float, ...]]:
    """Variant -> quartiles of a step's milliseconds, each in turn with the others."""
    torch.compiler.reset()
    cases = {variant: Case(options, variant, method, dtype, mode == "compiled") for variant in VARIANTS}
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for case in cases.values():
        case.step()
        case.step()
    for turn in range(options.rounds):
        for variant in VARIANTS[:: 1 if turn % 2 else -1]:
            taken[variant].append(1000 * cases[variant].seconds())
    return {variant: tuple(statistics.quantiles(values, n=4)) for variant, values in taken.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a busy machine")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--quick", action="store_true", help="one layer of hidden size 256, eager, on bfloat16")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        small = {"hidden": 256, "layers": 1, "tokens": 256, "rounds": 5, "dtypes": ["bfloat16"], "modes": ["eager"]}
        vars(options).update(small, methods=["LoRA", "LoRA, dropout", "DoRA", "LoRA, experts"])
    return options


def main() -> None:
    """Print the tables."""
    options = parse()
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        variant, method, dtype, mode = json.loads(options.one)
        case = Case(options, variant, method, dtype, mode == "compiled")
        print(json.dumps({"peak": case.peak(), "saved": case.saved()}))
        return
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, PEFT {peft.__version__}: hidden "
          f"{options.hidden}, {options.layers} layers, {options.tokens} tokens")  # fmt: skip
    results = []
    for dtype in options.dtypes:
        for mode in options.modes:
            print(f"\n| {dtype}, {mode} | saved beyond bare, MB: fxpeft / PEFT | | peak, MB: bare / fxpeft / PEFT "
                  "| bare, ms | fxpeft | PEFT | fxpeft / PEFT |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
            for method in options.methods:
                held = {v: memory(sys.argv[1:], v, method, dtype, mode) for v in VARIANTS}
                taken = times(options, method, dtype, mode)
                ours, theirs = ((held[v]["saved"] - held["bare"]["saved"]) / 1e6 for v in VARIANTS[1:])
                part = f"{ours / theirs:.3f}" if theirs > 0 else ""
                middle = {v: quartiles[1] for v, quartiles in taken.items()}
                spread = {v: (quartiles[2] - quartiles[0]) / 2 / middle["bare"] for v, quartiles in taken.items()}
                over = [f"{middle[v] / middle['bare']:.3f}x ± {spread[v]:.3f}" for v in VARIANTS[1:]]
                peaks = " / ".join(f"{held[v]['peak'] / 1e6:.1f}" for v in VARIANTS)
                print(f"| {method} | {ours:.2f} / {theirs:.2f} | {part} | {peaks} | {middle['bare']:.1f} | {over[0]} "
                      f"| {over[1]} | {middle['fxpeft'] / middle['PEFT']:.3f}x |", flush=True)  # fmt: skip
                results.append({"method": method, "dtype": dtype, "mode": mode, "memory": held, "ms": taken})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
