"""What an adapter costs per forward, and what a swap costs: fxpeft beside PEFT and the bare model, in one run.

    python examples/benchmarks/hotswap.py --output results
    python examples/benchmarks/hotswap.py --quick --check results/hotswap.json

Prints a Markdown table per size and writes it to the folder, as JSON too, with a plot (PNG). Every variant has a
process of its own, and in each round all of them take their turn, of which the fastest of a few calls counts: what else
the machine does only adds. A ratio is the median over the rounds of what a variant took over what the bare model took
in that round, with quartiles. ``--quick`` takes about two minutes: one size, a decode step and 64 tokens. ``--check``
names what moved by more than both spreads. Needs ``.[bench]``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fxpeft

RANK, MAX_RANK = 16, 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (1, 64, 512)
GENERATED = 32  # tokens that one call of ``generate`` makes
GENERATE = f"generate {GENERATED}"
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


def idle(base: nn.Module, folder: str) -> nn.Module:
    """fxpeft: prepared, and off."""
    model = in_slots(base, folder)
    fxpeft.disable_adapters(model)
    return model


VARIANTS: dict[str, Variant] = {
    "bare": lambda base, folder: base,
    "folded into weights": lambda base, folder: peft_exact(base, folder).merge_and_unload(),
    "fxpeft dynamic": in_slots,
    "fxpeft static": lambda base, folder: in_slots(base, folder, "static"),
    "PEFT exact rank": peft_exact,
    "PEFT exact, no autocast": lambda base, folder: peft_exact(base, folder, False),
    "PEFT padded": peft_padded,
    "fxpeft off": idle,
    "fxpeft off, fxpeft.compile": idle,
}
QUICK = ("bare", "fxpeft dynamic", "PEFT exact rank", "fxpeft off")


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


def decode(model: nn.Module, backend: str) -> Callable[[], object]:
    """``generate`` with a static cache, whose step of one token it compiles, as in serving."""
    ids = torch.arange(8).view(1, -1)
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend=backend)
    config._compile_all_devices = True  # on a CPU too
    generator: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model

    def call() -> object:
        with torch.no_grad():
            return generator.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=GENERATED, max_new_tokens=GENERATED,
                do_sample=False, cache_implementation="static", pad_token_id=0, compile_config=config,
            )  # fmt: skip

    return call


def worker(
    variant: str, hidden: int, layers: int, folder: str, lengths: Sequence[int], fresh: bool, threads: int, pipe: Any
) -> None:
    """One variant in a process of its own: nothing of another's compile cache or memory in its way."""
    torch.set_num_threads(threads)
    torch._inductor.config.force_disable_caches = fresh  # a first compile is measured as a first one
    torch._inductor.config.compile_threads = 1
    model: Any = VARIANTS[variant](make_base(hidden, layers), folder)
    compiled = (fxpeft if variant.endswith("fxpeft.compile") else torch).compile(model, fullgraph=True, dynamic=False)
    calls = {}
    for length in lengths:
        ids = torch.arange(length).view(1, -1) % 256
        calls[f"eager {length}"] = forward(model, ids)
        calls[f"compiled {length}"] = forward(compiled, ids)
    calls[GENERATE] = decode(model, "fxpeft" if variant.endswith("fxpeft.compile") else "inductor")
    while (wanted := pipe.recv()) != "peak":
        name, repeats = wanted
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            calls[name]()
            times.append(time.perf_counter() - start)
        pipe.send(times)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class Spread(NamedTuple):
    """What was measured of a variant: its median, and the quartiles and median of its ratios to the bare model."""

    value: float
    low: float
    ratio: float
    high: float


Columns = dict[str, dict[str, Spread]]  # column -> variant -> ms, s or MB


def spread(rounds: Sequence[float], bare: Sequence[float]) -> Spread:
    """Of the rounds of a variant, beside those of the bare model."""
    ratios = [value / other for value, other in zip(rounds, bare, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Spread(statistics.median(rounds), low, ratio, high)


def latencies(args: argparse.Namespace, hidden: int, folder: str) -> Columns:
    """All columns of one size: each a row of rounds, in which every variant takes its turn."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    processes = []
    for name in args.variants:
        pipes[name], end = context.Pipe()
        given = (name, hidden, args.layers, folder, args.lengths, not args.quick, args.threads, end)
        processes.append(context.Process(target=worker, args=given))
        processes[-1].start()

    def ask(name: str, what: object) -> Any:
        pipes[name].send(what)
        return pipes[name].recv()

    def warm(column: str) -> dict[str, float]:
        """A first call of each; where that isn't measured they compile beside each other."""
        if not args.quick and not columns:
            return {name: ask(name, (column, 1))[0] for name in args.variants}
        for name in args.variants:
            pipes[name].send((column, 1))
        return {name: pipes[name].recv()[0] for name in args.variants}

    columns: Columns = {}
    if not args.quick:
        for name in args.variants:
            ask(name, ("eager 1", 3))
    modes = ("compiled",) if args.quick else ("compiled", "eager")
    for column in [*(f"{mode} {length}" for mode in modes for length in args.lengths), GENERATE]:
        first = warm(column)
        if not args.quick and not columns:
            columns["first compile"] = {name: spread([s], [first["bare"]]) for name, s in first.items()}
        times: dict[str, list[float]] = {name: [] for name in args.variants}
        end_time = time.perf_counter() + args.seconds
        while len(times["bare"]) < 7 or time.perf_counter() < end_time:
            turn = len(times["bare"]) % len(args.variants)
            for name in [*args.variants][turn:] + [*args.variants][:turn]:
                repeats = 2 if column == GENERATE else 4 if column.endswith("512") else 7
                # the first call of a turn finds cold caches
                times[name].append(1e3 * min(ask(name, (column, repeats))[1:]))
        columns[column] = {name: spread(values, times["bare"]) for name, values in times.items()}
        print(column, {name: round(s.ratio, 3) for name, s in columns[column].items()}, file=sys.stderr, flush=True)
    peaks = {name: ask(name, "peak") for name in args.variants}
    columns["peak MB"] = {name: spread([peak], [peaks["bare"]]) for name, peak in peaks.items()}
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


def table(columns: Columns) -> str:
    """Ratios to the bare model with quartiles; its own figures stand in brackets; peak memory as it is."""
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in columns["peak MB"]:
        cells = []
        for column, values in columns.items():
            found = values[name]
            ratio = f"{found.ratio:.3f}x" + (f" [{found.low:.3f}, {found.high:.3f}]" if found.low < found.high else "")
            if column == GENERATE:
                ratio += f" ({1e3 * GENERATED / found.value:.0f} tokens/s)"
            elif name == "bare":
                ratio += f" ({found.value:.2f} {'s' if column == 'first compile' else 'ms'})"
            cells.append(f"{found.value:.0f}" if column == "peak MB" else ratio)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def moved(now: Mapping[str, Mapping[str, Any]], stored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is outside of the quartiles that were stored, and these outside of its own: one line for each."""
    for title in now.keys() & stored.keys():
        for column in [c for c in now[title] if c in stored[title] and c not in ("first compile", "peak MB")]:
            for name in now[title][column].keys() & stored[title][column].keys():
                new, old = Spread(*now[title][column][name]), Spread(*stored[title][column][name])
                if new.low > old.high or new.high < old.low:
                    yield (
                        f"{title}, {column}, {name}: {old.ratio:.3f}x [{old.low:.3f}, {old.high:.3f}] -> "
                        f"{new.ratio:.3f}x [{new.low:.3f}, {new.high:.3f}]"
                    )


def plot(results: dict[str, Columns], path: Path) -> None:
    """Compiled latency of every variant over the bare model's, a panel per size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False, sharey=True)
    for axis, (title, columns) in zip(axes[0], results.items(), strict=True):
        shown = {n.removeprefix("compiled "): v for n, v in columns.items() if n.startswith("compiled")}
        names = [n for n in columns["peak MB"] if n != "bare"]
        for i, name in enumerate(names):
            heights = [v[name].ratio for v in shown.values()]
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one is steadier on shared cores")
    parser.add_argument("--quick", action="store_true", help="the first size, a decode step and 64 tokens, no swaps")
    parser.add_argument("--check", type=Path, help="a JSON file of an earlier run: name what moved, and exit with 1")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    stored = {} if args.check is None else json.loads(args.check.read_text())["results"]
    args.lengths, args.variants = LENGTHS, (*VARIANTS,)
    if args.quick:
        args.hidden, args.lengths, args.variants, args.seconds = args.hidden[:1], LENGTHS[:2], QUICK, 3
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads"
    versions = f"torch {torch.__version__}, PEFT {peft.__version__}"
    text, results = [f"{machine}, {versions}; rank {RANK} in {MAX_RANK}; medians of ratios [quartiles]"], {}
    with tempfile.TemporaryDirectory() as root:
        for hidden in args.hidden:
            base = make_base(hidden, args.layers)
            folder = make_adapters(base, 1, Path(root) / str(hidden))[0]
            title = f"hidden {hidden}, {args.layers} layers"
            del base
            results[title] = latencies(args, hidden, folder)
            text.append(f"\n### {title}\n\n{table(results[title])}")
            print(text[-1], flush=True)
        rows: dict[str, float] = {}
        if not args.quick:
            base = make_base(args.hidden[0], args.swap_layers)
            folders = make_adapters(base, 10, Path(root) / "swaps")
            first = load_file(f"{folders[0]}/adapter_model.safetensors").values()
            size = sum(t.numel() * t.element_size() for t in first)
            rows = swaps(base, folders, args.seconds)
            text.append(f"\n### swaps of {size / 1e6:.1f} MB, hidden {args.hidden[0]}, {args.swap_layers} layers\n")
            text += ["| what | ms |", "|---|---|", *(f"| {name} | {ms:.2f} |" for name, ms in rows.items())]
    written = {"machine": machine, "versions": versions, "results": results, "swaps": rows}
    (args.output / "hotswap.json").write_text(json.dumps(written, indent=1) + "\n")
    (args.output / "hotswap.md").write_text("\n".join(text) + "\n")
    if not args.quick:
        plot(results, args.output / "hotswap.png")
    print("\n".join(text))
    if lines := sorted(moved(results, stored)):
        print("\n".join(["moved by more than the spread:", *lines]))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
