"""Every Python block of the README runs, in order, and prints what the block after it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Code and expected output of each block."""
    return [(match[1], match[2] or "") for match in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def test_the_readme_runs_and_prints_what_it_shows() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    namespace: dict[str, object] = {}
    found = blocks()
    assert len(found) >= 9
    for code, expected in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        assert printed.getvalue().strip() == expected.strip()
