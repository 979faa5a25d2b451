"""The main job on a fresh machine: two adapters, one compiled model, swaps between them.

    python examples/quickstart.py

Makes a small byte-level Llama and trains it briefly on text that ships with Python: its help
(English prose) and its library's source. Trains an adapter for each of the two with transformers'
Trainer, saves both, loads them into one compiled model and swaps between them. The table shows the
perplexity of base and adapters on both held-out texts; each adapter has to win on its own.

``--model`` takes any Hugging Face id or folder instead, ``--text-a`` / ``--text-b`` any text files.
"""

from __future__ import annotations

import argparse
import inspect
import math
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxpeft
from fxpeft.testing import count_graphs

BLOCK = 128  # tokens per example
SOURCES = ("argparse", "ast", "dataclasses", "difflib", "enum", "inspect", "pathlib", "statistics", "tarfile", "typing")


def python_texts() -> tuple[str, str]:
    """English prose and Python source, both from the standard library."""
    modules = (__import__(name) for name in SOURCES)
    return unique(pydoc_data.topics.topics.values()), unique(inspect.getsource(module) for module in modules)


def unique(texts: Iterable[str]) -> str:
    """Every paragraph once: the help repeats whole sections, and what is held out must not be trained on."""
    paragraphs = (paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


class ByteTokenizer:
    """One token per byte."""

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def make_base() -> LlamaForCausalLM:
    """A Llama of about a million parameters over bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=BLOCK, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def blocks(tokens: list[int]) -> list[dict[str, Tensor]]:
    """Examples for the Trainer: blocks of tokens that are their own labels."""
    rows = torch.tensor(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)
    return [{"input_ids": row, "labels": row} for row in rows]


def split(examples: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Every eighth block is held out, 64 at most; they are spread over the whole text."""
    held_out = examples[::8][:64]
    return [e for i, e in enumerate(examples) if i % 8], held_out


def train(model: nn.Module, examples: list[dict[str, Tensor]], steps: int, rate: float, folder: Path) -> None:
    """A short run of transformers' Trainer, with its progress bar."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=min(20, steps // 10), logging_steps=max(steps // 4, 1),
        save_strategy="no", report_to=[], seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=examples).train()


def perplexity(model: Any, examples: list[dict[str, Tensor]], batch: int, device: torch.device) -> float:
    """Of held-out blocks, in full batches only: one shape, so one graph."""
    rows = torch.stack([e["input_ids"] for e in examples])
    losses = []
    with torch.no_grad():
        for ids in rows[: len(rows) // batch * batch].split(batch):
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            losses.append(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float().cpu(), ids[:, 1:].flatten()))
    return math.exp(torch.stack(losses).mean().item())


def show(rows: list[list[str]]) -> None:
    """An aligned table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(row[0].ljust(widths[0]), *cells, sep="  ")
        if number == 0:
            print("  ".join("-" * w for w in widths))


def main() -> int:
    """Train, save, load, swap, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or folder; by default a small model is made and trained")
    parser.add_argument("--text-a", type=Path, help="text file for adapter A; by default Python's help")
    parser.add_argument("--text-b", type=Path, help="text file for adapter B; by default Python's source")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each adapter; the base gets as many")
    parser.add_argument("--output", type=Path, help="folder for the adapters; a temporary one by default")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, found {args.steps}")
    torch.manual_seed(0)
    output = args.output or Path(tempfile.mkdtemp(prefix="fxpeft-quickstart-"))
    texts = python_texts()
    text_a = args.text_a.read_text(encoding="utf-8") if args.text_a else texts[0]
    text_b = args.text_b.read_text(encoding="utf-8") if args.text_b else texts[1]
    if args.model:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encode: Any = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    else:
        torch.set_num_threads(1)  # more gain nothing on matrices this small, and stall wherever cores are shared
        model, encode = make_base(), ByteTokenizer()
    (train_a, test_a), (train_b, test_b) = (split(blocks(encode(text))) for text in (text_a, text_b))
    if not (train_a and train_b):
        parser.error(f"each text has to hold at least two blocks of {BLOCK} tokens")
    if not args.model:
        print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps on both texts")
        train(model, train_a[: len(train_b)] + train_b[: len(train_a)], args.steps, 3e-3, output)

    configs = {
        "A": fxpeft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        "B": fxpeft.LoraConfig(r=16, lora_alpha=24, target_modules="all-linear", rank_pattern={"v_proj": 4}),
    }
    for name, examples in (("A", train_a), ("B", train_b)):
        fxpeft.add_adapter(model, configs[name], name)
        print(f"\nadapter {name}: ", end="")
        fxpeft.trainable_parameters(model)
        train(model, examples, args.steps, 2e-3, output)
        fxpeft.save_adapter(model, output / name)
        fxpeft.remove(model)

    model.eval()
    fxpeft.prepare_hotswap(model, max_rank=32, targets="all-linear")
    for name in configs:
        fxpeft.load_adapter(model, output / name, name)
    device = next(model.parameters()).device
    compiled = torch.compile(model, fullgraph=True)
    batch = min(16, len(test_a), len(test_b))
    rows = [["", "perplexity on A", "on B", "swap"]]
    found: dict[str, tuple[float, ...]] = {}
    with count_graphs() as counted, torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("base", "A", "B"):
            start = time.perf_counter()
            if name == "base":
                fxpeft.disable_adapters(model)
            else:
                fxpeft.enable_adapters(model)
                start = time.perf_counter()
                fxpeft.set_adapter(model, name)
            took = time.perf_counter() - start
            found[name] = tuple(perplexity(compiled, test, batch, device) for test in (test_a, test_b))
            label = name if name == "base" else f"adapter {name}, rank {configs[name].r}"  # type: ignore[attr-defined]
            rows.append([label, *(f"{value:.3f}" for value in found[name]), f"{1e3 * took:.2f} ms"])
    print()
    show(rows)
    print(f"\ncompiled graphs: {counted.graphs}; the adapters are in {output}")
    won = found["A"][0] < min(found["base"][0], found["B"][0]) and found["B"][1] < min(found["base"][1], found["A"][1])
    if not won:
        print("an adapter did not win on its own text; train longer with --steps", file=sys.stderr)
    if counted.graphs != 1:
        print(f"expected one compiled graph, found {counted.graphs}", file=sys.stderr)
    return 0 if won and counted.graphs == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
