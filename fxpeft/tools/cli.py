"""The command line: ``fxpeft`` or ``python -m fxpeft``.

Every command takes folders and hub ids, and ``--json`` for scripts. Exit codes: 0: yes, done or equal;
1: it was asked and the answer is no (``check``, ``diff``); 2: the question itself was wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import fxpeft
from fxpeft.errors import AdapterError
from fxpeft.tools.answers import Json, Model, Source, show
from fxpeft.tools.check import check
from fxpeft.tools.convert import Folded, adapted, convert
from fxpeft.tools.gpu_check import gpu_check
from fxpeft.tools.plan import plan
from fxpeft.tools.serve import serve

app = typer.Typer(
    name="fxpeft", help=fxpeft.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(f"fxpeft {fxpeft.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def inspect(adapter: Source, as_json: Json = False) -> None:
    """Show what is in an adapter: config, sites, ranks, norms of the updates, size."""
    from fxpeft.checkpoint import read
    from fxpeft.checkpoint.adapter_file import inspect_sites, site_tensors
    from fxpeft.methods import method_of
    from fxpeft.planning.table import size

    found = read(adapter)
    sites, rest = inspect_sites(found), site_tensors(found)[1]
    own = {k: v for k, v in found.config.to_dict().items() if v not in (None, {}, [])}
    total = {
        "method": method_of(found.config).name,
        "base": found.config.base_model_name_or_path,
        "sites": len(sites),
        "parameters": sum(t.numel() for t in found.tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in found.tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in found.tensors.values()}),
        "ranks": sorted({s.rank for s in sites if s.rank}),
        "finite": all(bool(t.isfinite().all()) for t in found.tensors.values()),
    }
    table = Table("site", "rank", "parameters", "norm", "shapes", box=None)
    for site in sites:
        norm = "" if site.norm is None else f"{site.norm:.4g}"
        shapes = ", ".join(f"{k} {v}" for k, v in site.shapes.items())
        table.add_row(site.name, str(site.rank or ""), size(site.parameters), norm, shapes)
    other = {key: list(tensor.shape) for key, tensor in rest.items()}
    lines = [f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in total.items()]
    lines += [f"{k}: {v}" for k, v in own.items() if k not in ("target_modules", "peft_version", "inference_mode")]
    content = {**total, "config": own, "site": sites, "other": other}
    show(as_json, content, *lines, table, *(f"{k} {v}" for k, v in other.items()))


app.command()(plan)
app.command()(check)
app.command()(convert)


@app.command()
def fold(
    adapter: Source,
    output: Annotated[Path, typer.Argument(help="The merged model's folder.")],
    model: Folded = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model's weights and save that model; NaN and infinity are refused."""
    from fxpeft.adapters.state import state_of

    if output.is_dir() and any(output.iterdir()):
        raise AdapterError(f"{output}: expected a new or an empty folder")
    whole, base = adapted(adapter, model)
    sites = list(state_of(whole).get("default").plan.sites)
    fxpeft.merge_and_unload(whole, safe=True)
    whole.save_pretrained(output)
    content = {"output": str(output), "base": base, "sites": sites}
    show(as_json, content, f"{output}: {base} with {len(sites)} sites folded")


@app.command()
def diff(before: Source, after: Source, as_json: Json = False) -> None:
    """Compare two adapters: configs, sites, and how far their updates are apart. Exit code 1 where they differ."""
    from fxpeft.checkpoint import read
    from fxpeft.checkpoint.adapter_file import diff_files

    found = diff_files(read(before), read(after))
    lines = [f"{name}: {a} -> {b}" for name, (a, b) in found.config.items()]
    lines += [*(f"- {name}" for name in found.removed), *(f"+ {name}" for name in found.added)]
    for site in found.changed:
        ranks = f"rank {site.ranks[0]} -> {site.ranks[1]}, " if site.ranks[0] != site.ranks[1] else ""
        apart = "differs" if site.distance is None else f"apart by {site.distance:.3g} of the update"
        lines.append(f"~ {site.name}: {ranks}{apart}")
    lines += [f"~ {key}" for key in found.rest]
    show(as_json, found, *(lines or ["no difference"]))
    raise typer.Exit(1 if found else 0)


@app.command()
def bench(
    model: Model,
    target: Annotated[str, typer.Option(help="A pattern for what is adapted.")] = "all-linear",
    rank: Annotated[int, typer.Option(min=1)] = 16,
    max_rank: Annotated[int, typer.Option(min=2)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = False,
    random: Annotated[bool, typer.Option("--random", help="Random weights: the folder needs only a config.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a forward with and without an adapter, and a swap, on this machine; medians, in turn."""
    from fxpeft.tools.bench import measure

    result = measure(
        model, target=target, rank=rank, max_rank=max_rank, batch=batch, length=length, rounds=rounds,
        compiled=compiled, random=random,
    )  # fmt: skip
    table = Table("", "ms", "of the base", box=None)
    for name, milliseconds in result.milliseconds.items():
        share = f"{milliseconds / result.milliseconds['base']:.2f}" if name != "swap" else ""
        table.add_row(name, f"{milliseconds:.3f}", share)
    show(as_json, result, f"{result.sites} sites, rank {rank} of {max_rank}, {result.device}", table,
           f"graphs: {result.graphs}")  # fmt: skip


app.command("gpu-check")(gpu_check)
app.command()(serve)


def main() -> None:
    """Run the command; errors of fxpeft are one message on stderr and exit code 2."""
    from fxpeft.passes.base import PassError

    try:
        app()
    except (AdapterError, PassError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
