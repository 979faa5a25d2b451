"""The command: ``fxpeft gpu-check`` and ``python -m fxpeft.gpu_check``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def gpu_check(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here, after each check.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Checks to run: names or globs; repeatable.")
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="Say which checks there are, and run none.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes and few rounds: do they run.")] = False,
    device: Annotated[
        str | None, typer.Option(help="The device's type, as cuda, or cpu for a dry run; default: what there is.")
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="In this process, without limits of time: for a debugger.")
    ] = False,
) -> None:
    """Check on a GPU what fxpeft promises, and measure it: one Markdown table. Exit code 1: a check failed."""
    from fxpeft.errors import AdapterError
    from fxpeft.tools.gpu_check.check import Setting
    from fxpeft.tools.gpu_check.checks import chosen
    from fxpeft.tools.gpu_check.device import about, found_kind, versions
    from fxpeft.tools.gpu_check.running import Result, run_apart, run_here
    from fxpeft.tools.gpu_check.table import report, table, write

    try:
        checks = chosen(only or ())
    except AdapterError as error:
        raise typer.BadParameter(str(error)) from None
    if names:
        for check in checks:
            needs = [f"needs {', '.join(check.needs)}"] * bool(check.needs) + [f"only {check.on}"] * bool(check.on)
            print(f"{check.name}: {check.sentence} ({', '.join([f'at most {check.limit} s', *needs])})")
        return
    there = found_kind()
    if device not in (None, "cpu", there):
        raise typer.BadParameter(f"device: expected cpu{f' or {there}' if there else ''}, found {device}")
    kind = device or there
    results: list[Result] = []
    running: Iterator[Result]
    if kind is None:
        print("There is no GPU: every check is skipped. A dry run on the CPU: --device cpu --quick\n")
        running = iter([Result.of(check, "skipped", reason="there is no GPU") for check in checks])
        described = None
    else:
        setting = Setting(kind, quick)
        running = (run_here if here else run_apart)(checks, setting)
        described = about(kind)
    found = report(results, described, versions(), quick=quick)
    for result in running:
        results.append(result)
        found = report(results, described, versions(), quick=quick)
        if kind is not None:
            said = f"{result.seconds:.1f} s" if result.status == "passed" else result.reason
            print(f"{len(results)}/{len(checks)} {result.name}: {result.status}, {said}", file=sys.stderr, flush=True)
        if json_file is not None:
            write(json_file, found)
    print(table(found))
    for result in results:
        if result.trace:
            print(f"\n{result.name}\n{result.trace}", file=sys.stderr)
    if found["failed"]:
        raise typer.Exit(1)
