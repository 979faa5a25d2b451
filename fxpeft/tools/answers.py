"""How commands answer: as JSON, or as what a person reads."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or hub id.")]
Target = Annotated[
    list[str] | None, typer.Option("--target", help="A pattern or name, repeatable; default: the architecture's.")
]
Source = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder or hub id.")]


def show(as_json: bool, content: Any, *shown: Any) -> None:
    """``content`` as JSON, or what a person reads."""
    if as_json:
        print(json.dumps(plain(content), indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for part in shown:
        console.print(Text(part) if isinstance(part, str) else part)


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
