"""A second process compiles nothing that the first one compiled: graphs and plans have stable cache keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, torch, fxpeft
from torch import nn
from torch._dynamo.utils import counters
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
    def forward(self, x):
        return self.a(x) * self.b(x)
torch.manual_seed(0)
model = nn.Sequential(Both(), nn.ReLU(), nn.Linear(6, 3)).eval()
fxpeft.prepare_hotswap(model, 8, targets=["a", "b", "2"], methods=("lora", "dora"))
fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
compiled = fxpeft.compile(model, passes=("fold_inactive", "group", "clean"))
with torch.no_grad():
    on = compiled(torch.ones(2, 4)).tolist()
    fxpeft.disable_adapters(model)
    off = compiled(torch.ones(2, 4)).tolist()
found = {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss")}
found |= {f"fx_{name}": counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
found["stacks"] = len(model[0].a.slot.stacks)
print(json.dumps({**found, "on": on, "off": off}))
"""


def run(cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_process_hits_the_cache(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert (first["hit"], first["miss"]) == (0, 2)  # the graph with slots and the one without: the counters do count
    assert (second["hit"], second["miss"], second["fx_miss"]) == (2, 0, 0)
    assert first["stacks"] == second["stacks"] == 1  # the graph with slots is the grouped one
    assert second["on"] == first["on"] != first["off"] == second["off"]
