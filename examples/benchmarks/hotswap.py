"""What an adapter costs per forward, and what a swap costs: fxpeft beside PEFT and the bare model, in one run.

    python examples/benchmarks/hotswap.py --output results

Prints a Markdown table per size and writes it with a plot (PNG) to the folder. Every latency is the
median of interleaved repeats: in each round all variants take their turn. Needs ``.[bench]``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft

RANK, MAX_RANK = 16, 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (1, 64, 512)
Variant = Callable[[nn.Module, str], nn.Module]


def make_base(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights; a small vocabulary, so that the head hides nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_adapters(base: nn.Module, count: int, root: Path) -> list[str]:
    """Folders of random adapters of rank 16 on all linear layers."""
    folders = []
    for i in range(count):
        config = fxpeft.LoraConfig(r=RANK, lora_alpha=24, target_modules=TARGETS)
        fxpeft.add_adapter(base, config, "made")
        for tensor in fxpeft.adapter_state_dict(base).values():
            tensor.normal_(std=0.02)
        folders.append(str(root / f"adapter{i}"))
        fxpeft.save_adapter(base, folders[-1])
        fxpeft.remove(base)
    return folders


def in_slots(base: nn.Module, folder: str, rank: str = "dynamic") -> nn.Module:
    """fxpeft: 128 ranks reserved, 16 in use."""
    fxpeft.prepare_hotswap(base, MAX_RANK, targets=TARGETS, rank=rank)  # type: ignore[arg-type]
    fxpeft.load_adapter(base, folder)
    return base


def peft_exact(base: nn.Module, folder: str, autocast: bool = True) -> nn.Module:
    """PEFT at the adapter's own rank: can't swap to another rank without recompiling."""
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=autocast).eval()


def peft_padded(base: nn.Module, folder: str) -> nn.Module:
    """PEFT prepared for hotswapping with its own function."""
    model = peft_exact(base, folder)
    prepare_model_for_compiled_hotswap(model, target_rank=MAX_RANK)
    return model


VARIANTS: dict[str, Variant] = {
    "bare": lambda base, folder: base,
    "folded into weights": lambda base, folder: peft_exact(base, folder).merge_and_unload(),
    "fxpeft dynamic": in_slots,
    "fxpeft static": lambda base, folder: in_slots(base, folder, "static"),
    "PEFT exact rank": peft_exact,
    "PEFT exact, no autocast": lambda base, folder: peft_exact(base, folder, False),
    "PEFT padded": peft_padded,
}


def interleaved(calls: dict[str, Callable[[], object]], seconds: float, least: int = 15) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        names = list(calls)
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def forward(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    return call


def worker(variant: str, hidden: int, layers: int, folder: str, pipe: Any) -> None:
    """One variant in a process of its own: nothing of another's compile cache or memory in its way."""
    torch._inductor.config.force_disable_caches = True  # a first compile is measured as a first one
    torch._inductor.config.compile_threads = 1
    model = VARIANTS[variant](make_base(hidden, layers), folder)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    calls = {}
    for length in LENGTHS:
        ids = torch.arange(length).view(1, -1) % 256
        calls[f"eager {length}"] = forward(model, ids)
        calls[f"compiled {length}"] = forward(compiled, ids)
    while (wanted := pipe.recv()) != "peak":
        name, repeats = wanted
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            calls[name]()
            times.append(time.perf_counter() - start)
        pipe.send(times)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def latencies(hidden: int, layers: int, folder: str, seconds: float) -> dict[str, dict[str, float]]:
    """Column -> variant -> milliseconds, MB of peak memory, and seconds of the first compile."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in VARIANTS:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=worker, args=(name, hidden, layers, folder, end)))
        processes[-1].start()

    def ask(name: str, what: object) -> Any:
        pipes[name].send(what)
        return pipes[name].recv()

    columns: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        ask(name, ("eager 1", 3))
    for length in LENGTHS:
        first = {name: ask(name, (f"compiled {length}", 1))[0] for name in VARIANTS}
        columns.setdefault("first compile", first)
    for column in (f"{mode} {length}" for mode in ("compiled", "eager") for length in LENGTHS):
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        end_time = time.perf_counter() + seconds
        rounds = 0
        while rounds < 7 or time.perf_counter() < end_time:
            turn = rounds % len(VARIANTS)
            for name in [*VARIANTS][turn:] + [*VARIANTS][:turn]:
                # the first call of a turn finds cold caches
                times[name] += ask(name, (column, 3 if column.endswith("512") else 6))[1:]
            rounds += 1
        columns[column] = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        print(column, {name: round(ms, 3) for name, ms in columns[column].items()}, file=sys.stderr, flush=True)
    columns["peak MB"] = {name: ask(name, "peak") for name in VARIANTS}
    for process in processes:
        process.join()
    return columns


def swaps(base: nn.Module, folders: list[str], seconds: float) -> dict[str, float]:
    """Swap times in milliseconds."""
    files = [f"{folder}/adapter_model.safetensors" for folder in folders[:2]]
    tensors = [list(load_file(file).values()) for file in files]
    flat = [torch.cat([t.flatten() for t in each]) for each in tensors]
    target, targets = torch.empty_like(flat[0]), [torch.empty_like(t) for t in tensors[0]]
    padded = peft_padded(copy.deepcopy(base), folders[0])
    model = copy.deepcopy(base)
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=TARGETS)
    for i, folder in enumerate(folders[:2]):
        fxpeft.load_adapter(model, folder, f"a{i}")
    swapped = copy.deepcopy(base)
    fxpeft.prepare_hotswap(swapped, MAX_RANK, targets=TARGETS)
    fxpeft.load_adapter(swapped, folders[0])
    turn = iter(range(10**9))

    def copy_file() -> None:
        for to, source in zip(targets, load_file(files[next(turn) % 2]).values(), strict=True):
            to.copy_(source)

    def copy_tensors() -> None:
        for to, source in zip(targets, tensors[next(turn) % 2], strict=True):
            to.copy_(source)

    found = interleaved(
        {
            "floor: one memcpy of the adapter's bytes": lambda: target.copy_(flat[next(turn) % 2]),
            "floor: copy its tensors one by one": copy_tensors,
            "fxpeft set_adapter, 2 loaded": lambda: fxpeft.set_adapter(model, f"a{next(turn) % 2}"),
            "floor: safetensors load and copy": copy_file,
            "fxpeft hotswap from a folder": lambda: fxpeft.hotswap(swapped, folders[next(turn) % 2]),
            "PEFT hotswap from a folder": lambda: hotswap_adapter(padded, folders[next(turn) % 2], "default"),
        },
        seconds,
        least=40,
    )  # fmt: skip
    for count in (1, 10, 100):
        many = copy.deepcopy(base)
        fxpeft.prepare_hotswap(many, MAX_RANK, targets=TARGETS)
        for i in range(count):
            fxpeft.load_adapter(many, folders[i % len(folders)], f"a{i}")
        # back and forth over the same two places in memory, so that only the number loaded differs
        pair = ["a0", f"a{min(1, count - 1)}"]
        call = {"set": lambda many=many, pair=pair: fxpeft.set_adapter(many, pair[next(turn) % 2])}
        found[f"fxpeft set_adapter, {count} loaded"] = interleaved(call, seconds / 3, least=40)["set"]
        del many
        gc.collect()
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    """Ratios to the bare model, whose own figures stand in brackets; peak memory as it is."""
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in VARIANTS:
        cells = []
        for column, values in columns.items():
            unit = "s" if column == "first compile" else "ms"
            bare = f" ({values[name]:.2f} {unit})" if name == "bare" else ""
            ratio = f"{values[name] / values['bare']:.2f}x{bare}"
            cells.append(f"{values[name]:.0f}" if column == "peak MB" else ratio)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Compiled latency of every variant over the bare model's, a panel per size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False, sharey=True)
    for axis, (title, columns) in zip(axes[0], results.items(), strict=True):
        shown = {n.removeprefix("compiled "): v for n, v in columns.items() if n.startswith("compiled")}
        names = [n for n in VARIANTS if n != "bare"]
        for i, name in enumerate(names):
            heights = [v[name] / v["bare"] for v in shown.values()]
            axis.bar([x + 0.8 * i / len(names) for x in range(len(shown))], heights, 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([x + 0.35 for x in range(len(shown))], [f"{n} token{'s' if n != '1' else ''}" for n in shown])
        axis.set_title(title)
    axes[0][0].set_ylabel("time / bare model, compiled")
    axes[0][0].set_ylim(bottom=0.8)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--layers", type=int, default=2, help="for the latencies")
    parser.add_argument("--swap-layers", type=int, default=12, help="for the swap times, at the first size")
    parser.add_argument("--seconds", type=float, default=10, help="per row of measurements")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, PEFT {peft.__version__}"
    text, results = [f"{machine}, {versions}; rank {RANK} in {MAX_RANK}"], {}
    with tempfile.TemporaryDirectory() as root:
        for hidden in args.hidden:
            base = make_base(hidden, args.layers)
            folder = make_adapters(base, 1, Path(root) / str(hidden))[0]
            title = f"hidden {hidden}, {args.layers} layers"
            del base
            results[title] = latencies(hidden, args.layers, folder, args.seconds)
            text.append(f"\n### {title}\n\n{table(results[title])}")
            print(text[-1], flush=True)
        base = make_base(args.hidden[0], args.swap_layers)
        folders = make_adapters(base, 10, Path(root) / "swaps")
        size = sum(t.numel() * t.element_size() for t in load_file(f"{folders[0]}/adapter_model.safetensors").values())
        rows = swaps(base, folders, args.seconds)
        text.append(f"\n### swaps of {size / 1e6:.1f} MB, hidden {args.hidden[0]}, {args.swap_layers} layers\n")
        text += ["| what | ms |", "|---|---|", *(f"| {name} | {ms:.2f} |" for name, ms in rows.items())]
    (args.output / "hotswap.md").write_text("\n".join(text) + "\n")
    plot(results, args.output / "hotswap.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
