"""The same tests in a process where PEFT can't be imported: what a user without PEFT has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = """
import sys
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
code = pytest.main(["-p", "no:cacheprovider", "-o", "addopts=", *sys.argv[1:]])
assert not [name for name in sys.modules if name.startswith("peft.")]
raise SystemExit(code)
"""


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_everything_runs_without_peft() -> None:
    modules = ("methods", "pretrained", "trainer", "hotswap")
    slow = "not compile and not inductor and not enabled_hotswap"
    output = run(*(f"test_transformers_{name}.py" for name in modules), "-k", slow)
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) >= 65, output
    assert "skipped" not in output


def test_a_family_each_without_peft() -> None:
    output = run("test_transformers_families.py", "-k", "train and (llama or gpt2 or bert or whisper)")
    assert "5 passed" in output  # roberta is a bert too


@pytest.mark.slow
def test_trl_without_peft() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    output = run("test_trl.py", "-k", "first_step or head_is_refused or later")
    assert "8 passed" in output
