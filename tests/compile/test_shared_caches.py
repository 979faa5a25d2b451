"""Caches on disk: a second start compiles nothing, with swaps, other names, paths and ranks; so with artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import python

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import functools, json, os, torch, fxpeft
from pathlib import Path
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._dynamo.utils import counters
from adapter_files import save
from block_nets import TARGETS, inputs, net
from closeness import assert_close

pick_vec_isa()  # what the compiler and the processor can: asked, by compiling, where it is known by now
os.environ["TORCHINDUCTOR_CACHE_DIR"] = {cache!r}
name, rank, artifacts, root = {name!r}, {rank}, {artifacts!r}, Path({root!r})
if artifacts == "load":
    assert torch.compiler.load_cache_artifacts((root / "artifacts").read_bytes()) is not None
config = fxpeft.LoraConfig(r=rank, lora_alpha=3, target_modules=["query", "out"], rank_pattern={{"0.out": 5}})
folder = save(net(), config, root / name, seed=rank)
x = inputs()
grouped = functools.partial(fxpeft.compile, passes=("fold_inactive", "group", "clean"))
for compiler in (torch.compile, fxpeft.compile, grouped):
    torch._dynamo.reset()
    model = net()
    methods = ("lora", "dora") if compiler is grouped else ("lora",)
    fxpeft.prepare_hotswap(model, 8, targets=TARGETS, methods=methods)
    fxpeft.load_adapter(model, folder, name)
    compiled = compiler(model, fullgraph=True)
    fresh = net()
    fxpeft.load_adapter(fresh, folder)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(compiled(x), fresh(x))
        with fxpeft.disabled(model):
            assert_close(compiled(x), net()(x))
        fxpeft.hotswap(model, folder, name)
        fxpeft.set_scale(model, name, 0.5)
        fxpeft.set_scale(fresh, "default", 0.5)
        assert_close(compiled(x), fresh(x))
assert len(model.blocks[0].query.slot.stacks) == 1  # the graph with slots is the grouped one
if artifacts == "save":
    (root / "artifacts").write_bytes(torch.compiler.save_cache_artifacts()[0])
print(json.dumps({{
    "aot hits": counters["aot_autograd"]["autograd_cache_hit"],
    "aot misses": counters["aot_autograd"]["autograd_cache_miss"],
    "aot bypassed": counters["aot_autograd"]["autograd_cache_bypass"],
    "graph misses": counters["inductor"]["fxgraph_cache_miss"],
    "graph bypassed": counters["inductor"]["fxgraph_cache_bypass"],
}}))
"""


def start(cache: Path, **values: Any) -> dict[str, int]:
    """What a process found in its caches."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), cache=str(cache), **{"artifacts": "", **values})
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """torch.compile's graph, which fxpeft.compile finds again, its own without slots, and two of grouped sites."""
    first = start(tmp_path / "one", name="a", rank=3, root=str(tmp_path / "first"), artifacts="save")
    assert first["aot misses"] == 4
    assert first["aot bypassed"] == first["graph bypassed"] == 0
    nothing = {"aot hits": 5, "aot misses": 0, "aot bypassed": 0, "graph misses": 0, "graph bypassed": 0}
    again = start(tmp_path / "one", name="user-7", rank=6, root=str(tmp_path / "elsewhere" / "second"))
    assert again == nothing
    # on another machine: an empty folder, and what save_cache_artifacts gave
    moved = start(tmp_path / "two", name="b", rank=2, root=str(tmp_path / "first"), artifacts="load")
    assert moved == nothing
