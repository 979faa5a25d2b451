"""The guide's flow in ``examples/`` runs, also where PEFT can't be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "transformers_integration.py"
RUN = 'import runpy, sys; sys.modules["peft"] = None; runpy.run_path(sys.argv[1], run_name="__main__")'


def test_the_guides_flow() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("{")]  # Trainer's own are dicts
    assert lines == [
        "saved: ['adapter_config.json', 'adapter_model.safetensors']",
        "active: ['default']",
        "active: ['first', 'second']",
        "three swaps, no recompile",
    ]
