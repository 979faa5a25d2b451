"""Every Python block of the README and of the guides runs, in order, and prints what the block after it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Code and expected output of each block."""
    return [(match[1], match[2] or "") for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def test_the_readme_has_its_blocks() -> None:
    assert len(blocks(README)) >= 9


@pytest.mark.parametrize("page", [README, *GUIDES], ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page: Path) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    namespace: dict[str, object] = {}
    for code, expected in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), namespace)
        assert printed.getvalue().strip() == expected.strip()
