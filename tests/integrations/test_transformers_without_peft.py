"""The same tests in a process where PEFT can't be imported: what a user without PEFT has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = """
import json, sys
sys.modules["peft"] = None  # every import of it fails, and no package of that name is found
import pytest
try:
    import peft
except ImportError:
    pass
else:
    raise SystemExit("PEFT could be imported")
from transformers.utils import is_peft_available
assert not is_peft_available()
for arguments in json.loads(sys.argv[1]):
    print("<<< another run >>>")
    print("code", int(pytest.main(["-p", "no:cacheprovider", "-o", "addopts=", *arguments])))
    assert not [name for name in sys.modules if name.startswith("peft.")]
"""
RUNS = {
    "everything": [
        *(f"test_transformers_{name}.py" for name in ("methods", "pretrained", "trainer", "hotswap")),
        "-k", "not compile and not inductor and not enabled_hotswap",
    ],
    "families": ["test_transformers_families.py", "-k", "train and (llama or gpt2 or bert or whisper)"],
    "trl": ["test_trl.py", "-k", "first_step or head_is_refused or later"],
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What pytest printed of each, all run in one process."""
    command = [sys.executable, "-c", RUN, json.dumps([*RUNS.values()])]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return dict(zip(RUNS, done.stdout.split("<<< another run >>>\n")[1:], strict=True))


def of(run: str, outputs: dict[str, str]) -> str:
    """What a run printed that passed."""
    assert outputs[run].rstrip().endswith("code 0"), outputs[run][-6000:]
    return outputs[run]


def test_everything_runs_without_peft(outputs: dict[str, str]) -> None:
    output = of("everything", outputs)
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) >= 65, output
    assert "skipped" not in output


def test_a_family_each_without_peft(outputs: dict[str, str]) -> None:
    output = of("families", outputs)
    assert "5 passed" in output  # roberta is a bert too


@pytest.mark.slow
def test_trl_without_peft(outputs: dict[str, str]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    output = of("trl", outputs)
    assert "8 passed" in output
