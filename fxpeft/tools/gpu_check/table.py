"""Results as one Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxpeft.files import replace_files
from fxpeft.tools.gpu_check.running import Result

FORMAT = 1


def report(
    results: Sequence[Result], device: Mapping[str, Any] | None, versions: Mapping[str, Any], *, quick: bool
) -> dict[str, Any]:
    """What is written as JSON.

    Args:
        device: what the checks ran on; ``None``: there was nothing.
    """
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "skipped")}
    checks = [{k: v for k, v in dataclasses.asdict(result).items() if k != "broken"} for result in results]
    seconds = sum(result.seconds for result in results)
    return {
        "format": FORMAT, "device": device and dict(device), "versions": dict(versions), "quick": quick, **counts,
        "seconds": seconds, "checks": checks,
    }  # fmt: skip


def write(path: Path, found: Mapping[str, Any]) -> None:
    """The file, whole or not at all."""
    replace_files({path: (json.dumps(found, indent=2) + "\n").encode()})


def table(found: Mapping[str, Any]) -> str:
    """One Markdown table with a line above it that says on what; measurements have rows of their own."""
    device, versions = found["device"], found["versions"]
    where = "no accelerator" if device is None else ", ".join(str(v) for k, v in device.items() if k != "kind")
    stand = [f"{name} {version}" for name, version in versions.items() if version is not None]
    lines = [f"{where}; {', '.join(stand)}", "", "| check | result | s | found |", "|---|---|---|---|"]
    for check in found["checks"]:
        seen = check["seen"]
        plain = ", ".join(f"{name}: {value}" for name, value in seen.items() if not isinstance(value, Mapping))
        seconds = f"{check['seconds']:.1f}" if check["status"] != "skipped" else ""
        lines.append(_row(check["name"], check["status"], seconds, _short(check["reason"]) or plain))
        lines += [_row("", "", "", f"{n}: {_measured(v)}") for n, v in seen.items() if isinstance(v, Mapping)]
    counts = ", ".join(f"{found[status]} {status}" for status in ("passed", "failed", "skipped"))
    return "\n".join([*lines, "", f"{counts}, {found['seconds']:.0f} s"])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _measured(row: Mapping[str, Any]) -> str:
    parts = [f"{row['ms']:.3f} ms ({row['low']:.3f} to {row['high']:.3f})"]
    parts += [f"{row['ratio']:.2f}x"] if "ratio" in row else []
    parts += [f"{row['peak MB']:.1f} MB"] if "peak MB" in row else []
    parts += [f"{row['GB/s']:.2f} GB/s"] if "GB/s" in row else []
    return ", ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
