"""Many adapters in one batch: lanes of one compiled graph beside PEFT's ``adapter_names``, swaps in turn, and the base.

    python examples/benchmarks/many.py --output results --threads 1

Every variant has a process of its own, and in each round all of them take their turn. A step is one forward of a batch
whose rows each name an adapter of their own. Prints Markdown tables and writes them to the folder, as JSON too, with a
plot (PNG) of the forms that a slot with lanes can take, and of the one that is chosen. Needs ``.[bench]``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from hotswap import RANK, TARGETS, Spread, interleaved, make_adapters, make_base, spread
from torch import nn

import fxpeft
from fxpeft.passes.slots import lanes as forms

LANES = 16
BATCHES = (1, 4, 8, 16)
PREFILL = (8, 128)  # rows, tokens of each
LENGTHS = (1, 2, 4, 8, 16, 64)  # of eight rows, for the crossing point
REGISTERED = (16, 100, 1_000)
VARIANTS = ("bare", "bare, eager", "fxpeft, one adapter", "fxpeft, lanes", "fxpeft, swaps", "PEFT, adapter_names")
FORMS = {"packed": forms.packed, "gathered": forms.gathered, "chosen": None}  # by the shape, as for users
Step = Callable[[], object]


def names_of(rows: int) -> list[str]:
    """An adapter of its own for each row."""
    return [f"a{i}" for i in range(rows)]


def with_slots(base: nn.Module, folders: Sequence[str], lanes: int) -> nn.Module:
    """fxpeft, prepared for as many adapters at once."""
    fxpeft.prepare_hotswap(base, RANK * (lanes + 1), targets=TARGETS, lanes=lanes)
    for i, folder in enumerate(folders):
        fxpeft.load_adapter(base, folder, f"a{i}")
    return base


def with_peft(base: nn.Module, folders: Sequence[str]) -> nn.Module:
    """PEFT with all of them loaded."""
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="a0")  # type: ignore[arg-type]
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, f"a{i}")
    return model.eval()


def steps(variant: str, model: Any) -> Callable[[int, int], Step]:
    """Rows and tokens -> one forward of such a batch."""
    compiled = (
        model if variant.startswith(("PEFT", "bare, eager")) else torch.compile(model, fullgraph=True, dynamic=False)
    )

    def step(rows: int, tokens: int) -> Step:
        ids = torch.arange(rows * tokens).view(rows, tokens) % 256
        names = names_of(rows)

        def one_call() -> object:
            return compiled(input_ids=ids, use_cache=False)

        def in_turn() -> object:
            for i, name in enumerate(names):
                fxpeft.set_adapter(model, name)
                compiled(input_ids=ids[i : i + 1], use_cache=False)
            return None

        def mixed() -> object:
            with fxpeft.rows(model, names):
                return compiled(input_ids=ids, use_cache=False)

        def of_peft() -> object:
            return model(input_ids=ids, use_cache=False, adapter_names=names)

        called = {"fxpeft, swaps": in_turn, "PEFT, adapter_names": of_peft}.get(variant, one_call)
        return torch.no_grad()(mixed if variant.startswith("fxpeft, lanes") else called)

    return step


def worker(variant: str, hidden: int, layers: int, folders: Sequence[str], threads: int, pipe: Any) -> None:
    """One variant in a process of its own; it answers ``(rows, tokens, calls)`` with the seconds of these calls."""
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.recompile_limit = 64  # every shape of this script is a graph of its own
    model: Any = make_base(hidden, layers)
    if form := FORMS.get(variant.rpartition(", ")[2]):
        forms.form_of = lambda slot, x: form
    if variant.startswith("fxpeft, lanes"):
        model = with_slots(model, folders, LANES)
    elif variant.startswith("fxpeft"):
        model = with_slots(model, folders, 1)
    elif variant.startswith("PEFT"):
        model = with_peft(model, folders)
    made, step = dict[tuple[int, int], Step](), steps(variant, model)
    while (wanted := pipe.recv()) != "peak":
        rows, tokens, calls = wanted
        call = made.setdefault((rows, tokens), step(rows, tokens))
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        pipe.send(times)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_turns(
    args: argparse.Namespace, variants: Sequence[str], folders: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[int, int], dict[str, list[float]]], dict[str, float]]:
    """Shape -> variant -> milliseconds of every step, and peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = dict[str, Any](), []
    for name in variants:
        pipes[name], end = context.Pipe()
        given = (name, args.hidden, args.layers, folders, args.threads, end)
        processes.append(context.Process(target=worker, args=given))
        processes[-1].start()
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for shape in shapes:
        for name in variants:  # they compile beside each other
            pipes[name].send((*shape, 2))
        for name in variants:
            pipes[name].recv()
        times: dict[str, list[float]] = {name: [] for name in variants}
        end_time, rounds = time.perf_counter() + args.seconds, 0
        while rounds < 7 or time.perf_counter() < end_time:
            turn = rounds % len(variants)
            for name in [*variants[turn:], *variants[:turn]]:
                pipes[name].send((*shape, 5))
                times[name] += [1e3 * t for t in pipes[name].recv()[1:]]  # the first finds cold caches
            rounds += 1
        found[shape] = times
        medians = {name: round(statistics.median(t), 2) for name, t in times.items()}
        print(shape, medians, file=sys.stderr, flush=True)
    peaks = {}
    for name in variants:
        pipes[name].send("peak")
        peaks[name] = pipes[name].recv()
    for process in processes:
        process.join()
    return found, peaks


def registered(args: argparse.Namespace, folders: Sequence[str]) -> dict[str, dict[str, float]]:
    """How many are registered -> milliseconds of a decode step of eight rows, of naming eight others, and of a miss.

    A miss is an adapter that is on disk: it is loaded, named, and one token comes out.
    """
    found = {}
    for count in REGISTERED:
        model = with_slots(make_base(args.hidden, args.layers), [folders[i % len(folders)] for i in range(count)], 8)
        fxpeft.disable_adapters(model)  # the one that was loaded last has no lane of its own
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
        ids, turn = torch.arange(8).view(8, 1), iter(range(10**9))
        sets = [[f"a{i}" for i in range(8)], [f"a{count - 1 - i}" for i in range(8)]]
        size = 8 * sum(t.numel() * 4 for t in fxpeft.adapter_state_dict(model, "a0").values())
        held, target = torch.ones(size // 4), torch.empty(size // 4)

        @torch.no_grad()
        def step(names: Sequence[str], model: nn.Module = model, compiled: Any = compiled, ids: Any = ids) -> None:
            with fxpeft.rows(model, names):
                compiled(input_ids=ids, use_cache=False)

        def name_others(model: nn.Module = model, sets: Any = sets, turn: Any = turn) -> None:
            with fxpeft.rows(model, sets[next(turn) % 2]):
                pass

        def miss(model: nn.Module = model, turn: Any = turn, step: Any = step) -> None:
            fxpeft.load_adapter(model, folders[next(turn) % len(folders)], "fresh")
            step([*names_of(7), "fresh"])
            fxpeft.delete_adapter(model, "fresh")

        step(sets[0])
        calls: dict[str, Step] = {"step": lambda step=step, sets=sets: step(sets[0])}  # type: ignore[misc]
        row = interleaved(calls, args.seconds / 2)
        row |= interleaved({"others": name_others, "memcpy": lambda to=target, of=held: to.copy_(of)}, args.seconds / 2)  # type: ignore[misc]
        found[str(count)] = row | interleaved({"miss": miss}, args.seconds / 2)
    return found


def tables(result: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    lines = [f"{result['machine']}, {result['versions']}; rank {RANK}, {LANES} lanes, hidden {result['hidden']}\n"]
    shapes = list(result["steps"])
    lines += ["| | " + " | ".join(shapes) + " | peak MB |", "|---" * (len(shapes) + 2) + "|"]
    for name in VARIANTS:
        cells = []
        for shape in shapes:
            own = Spread(*result["steps"][shape][name]["spread"])
            p99, speed = result["steps"][shape][name]["p99"], result["steps"][shape][name]["tokens/s"]
            cells.append(
                f"{own.ratio:.2f}x [{own.low:.2f}, {own.high:.2f}], {own.value:.1f} ms, p99 {p99:.1f}, {speed:.0f}/s"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {result['peak MB'][name]:.0f} |")
    lines += ["\n| tokens of eight rows | " + " | ".join(f"{form}, ms" for form in FORMS) + " |", "|---|---|---|---|"]
    lines += [f"| {n} | " + " | ".join(f"{own[f]:.2f}" for f in FORMS) + " |" for n, own in result["forms"].items()]
    lines += ["\n| registered | a step, ms | eight others named, ms | memcpy of these | a miss, ms |", "|---" * 5 + "|"]
    for n, own in result["registered"].items():
        lines.append(f"| {n} | {own['step']:.2f} | {own['others']:.2f} | {own['memcpy']:.2f} | {own['miss']:.2f} |")
    return "\n".join(lines)


def plot(measured: dict[str, dict[str, float]], path: Path) -> None:
    """The forms over the tokens of a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for form in FORMS:
        axis.plot([int(n) for n in measured], [own[form] for own in measured.values()], marker="o", label=form)
    axis.set(xscale="log", yscale="log", xlabel="tokens of each of eight rows", ylabel="ms a forward")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="per column")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one is steadier on shared cores")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads", "hidden": args.hidden,
        "versions": f"torch {torch.__version__}, PEFT {peft.__version__}", "steps": {}, "forms": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        folders = make_adapters(make_base(args.hidden, args.layers), LANES, Path(root))
        shapes = [*((rows, 1) for rows in BATCHES), PREFILL]
        measured, result["peak MB"] = in_turns(args, VARIANTS, folders, shapes)
        for (rows, tokens), times in measured.items():
            result["steps"][f"{rows} x {tokens}"] = {
                name: {
                    "spread": spread(own, times["bare"]), "p99": statistics.quantiles(own, n=100)[98],
                    "tokens/s": 1e3 * rows * tokens / statistics.median(own),
                }
                for name, own in times.items()
            }  # fmt: skip
        both = [f"fxpeft, lanes, {form}" for form in FORMS]
        for (_, tokens), times in in_turns(args, both, folders, [(8, n) for n in LENGTHS])[0].items():
            own = {form: statistics.median(times[name]) for form, name in zip(FORMS, both, strict=True)}
            result["forms"][str(tokens)] = own
        result["registered"] = registered(args, folders)
    (args.output / "many.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "many.md").write_text(tables(result) + "\n")
    plot(result["forms"], args.output / "many.png")
    print(tables(result))


if __name__ == "__main__":
    main()
