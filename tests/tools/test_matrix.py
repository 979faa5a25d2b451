"""``.ci/matrix``: what it refuses before it makes an environment, and how it counts a run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).parents[2] / ".ci" / "matrix"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("torch", "expected NAME=VERSION, as torch=2.15; found torch"),
        ("torch=2.15;rm", "found torch=2.15;rm"),
        ("python=9.9", "there is no python9.9 on the PATH"),
    ],
)
def test_what_is_no_version_is_refused_first(argument: str, message: str) -> None:
    done = subprocess.run([sys.executable, MATRIX, argument], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert message in done.stderr


def test_it_runs_the_readmes_command_and_counts_what_came_of_it(tmp_path: Path) -> None:
    matrix = runpy.run_path(str(MATRIX))
    assert "pytest -n 2" in matrix["test_command"]()
    assert matrix["constraint"]("torch", "2.15") == "torch==2.15.*"
    assert matrix["constraint"]("torch", "2.15.1") == "torch==2.15.1"
    report = tmp_path / "junit.xml"
    assert matrix["count"](report) == "nothing ran"
    report.write_text('<testsuites><testsuite tests="1205" failures="2" errors="1" skipped="30"/></testsuites>')
    assert matrix["count"](report) == "1,172 / 3 / 30"
