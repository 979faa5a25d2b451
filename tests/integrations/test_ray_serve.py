"""Two of Ray Serve's replicas: each answer is its adapter's alone, and requests go where their adapter is."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpeft

PATIENCE = ("MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT", "QUEUE_LENGTH_RESPONSE_DEADLINE")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"


@pytest.mark.slow
def test_two_replicas(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason='needs fxpeft[ray]: pip install "ray[serve]"')
    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLE)
    assert spec is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)  # type: ignore[union-attr]
    example.make_adapters(tmp_path, 4)
    patient = {f"RAY_SERVE_{name}_S": "10" for name in PATIENCE}  # beside other tests a replica answers late
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **patient}
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("user-")]
    assert len(lines) == 4
    replicas = set()
    for line in lines:
        name, _, rest = line.partition(": ")
        tokens, _, asked = rest.partition(" by replica ")
        model = example.base()
        fxpeft.load_adapter(model, tmp_path / name)
        made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert ast.literal_eval(tokens) == made[0, 3:].tolist()
        after = asked.split(", ")[1:]  # the first round asks whoever is free
        assert len(set(after)) == 1
        replicas |= set(after)
    assert replicas == {"0", "1"}
