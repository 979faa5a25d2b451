"""The deployment example runs and serves what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import python

SCRIPT = Path(__file__).parents[2] / "examples" / "deploy.py"


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs the system's C++ compiler")
def test_the_example_runs(tmp_path: Path) -> None:
    done = python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a: first tags [0, 1, 2, 3, 0, 1, 2, 3]",
        "b: first tags [1, 2, 3, 0, 1, 2, 3, 0]",
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "tagger.pt2", "b.safetensors"}
