"""The pytest plugin: each tool passes where it should, and fails where it must."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import swap
from fxpeft.passes import torch_private
from fxpeft.testing import assert_single_graph, assert_swaps_clean, count_graphs, no_recompiles


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def double(x: Tensor, factor: int = 2) -> Tensor:
    return x * factor


def broken(x: Tensor) -> Tensor:
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


def test_no_recompiles_allows_the_first_compile_and_names_the_guard_of_the_next() -> None:
    compiled = torch.compile(double, backend="eager")
    with no_recompiles():
        compiled(torch.ones(3))
        compiled(torch.zeros(3))
        with pytest.raises(torch._dynamo.exc.RecompileError, match="factor"):
            compiled(torch.ones(3), factor=5)
    compiled(torch.ones(3), factor=7)  # outside of the block torch may do as it likes


def test_no_recompiles_warm_forbids_first_compiles_too() -> None:
    compiled = torch.compile(double, backend="eager")
    with no_recompiles(warm=True), pytest.raises(RuntimeError, match="recompile"):
        compiled(torch.ones(3))
    compiled(torch.ones(3))
    with no_recompiles(warm=True):
        assert compiled(torch.ones(3)).sum() == 6


def test_count_graphs_counts_graphs_and_breaks() -> None:
    with count_graphs() as one:
        torch.compile(double, backend="eager")(torch.ones(3))
    with count_graphs() as two:
        torch.compile(broken, backend="eager")(torch.ones(3))
    assert (one.graphs, one.breaks) == (1, ())
    assert two.graphs == 2
    assert two.breaks


def test_assert_single_graph() -> None:
    assert_single_graph(double, torch.ones(3), factor=3)
    with pytest.raises(AssertionError, match=r"found 2; graph breaks:\n.*graph_break"):
        assert_single_graph(broken, torch.ones(3))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    made = []
    for i, settings in enumerate(({"r": 2, "target_modules": ["q_proj"]}, {"r": 5, "target_modules": "all-linear"})):
        model = tiny_llama()
        fxpeft.add_adapter(model, fxpeft.LoraConfig(lora_alpha=7, **settings))  # type: ignore[arg-type]
        randomise(fxpeft.adapter_state_dict(model).values(), seed=i)
        fxpeft.save_adapter(model, tmp_path / str(i))
        made.append(str(tmp_path / str(i)))
    return made


def swaps_clean(folders: list[str], model: nn.Module | None = None) -> object:
    inputs = {"input_ids": token_ids(), "use_cache": False}
    options = {"backend": "aot_eager"}
    return assert_swaps_clean(model or tiny_llama(), folders, inputs, max_rank=8, compile_options=options, atol=1e-5)


def test_assert_swaps_clean_runs_the_matrix(folders: list[str]) -> None:
    model = tiny_llama()
    before = [type(m) for m in model.modules()]
    report = swaps_clean(folders, model)
    assert (report.graphs, report.swaps) == (1, 8)  # type: ignore[attr-defined]
    assert report.max_difference < 1e-5  # type: ignore[attr-defined]
    assert [type(m) for m in model.modules()] == before


def test_assert_swaps_clean_names_a_wrong_swap(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def forgetful(destinations: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(1)
        if len(calls) < 4:  # preparing makes three
            torch_private.copy_all(destinations, sources)

    monkeypatch.setattr(swap, "copy_all", forgetful)
    with pytest.raises(AssertionError, match=r"-> .*: output differs by"):
        swaps_clean(folders)


def test_assert_swaps_clean_notices_a_moved_slot(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = fxpeft.set_adapter

    def moving(model: nn.Module, name: str) -> None:
        real(model, name)
        slot = model.model.layers[0].self_attn.q_proj.slot  # type: ignore[union-attr]
        slot.a = slot.a.clone()

    monkeypatch.setattr(fxpeft, "set_adapter", moving)
    with pytest.raises(AssertionError, match=r"moved in memory: .*q_proj\.slot\.a"):
        swaps_clean(folders)


def test_assert_swaps_clean_notices_a_recompile(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # the active rank's size becomes a constant of the graph, as that of any tensor would
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda *args, **kwargs: None)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        swaps_clean(folders)


PROJECT = '''
import pytest, torch
from fxpeft.passes import InjectPass, MatchPass, Pipeline, Rewrite

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.one(x)

def gain(kind, base, x, *, g):
    return base(x) * g

def test_graph(graph_snapshot):
    graph = torch.fx.symbolic_trace(Net())
    passes = [MatchPass(lambda site: True), InjectPass({"one": [Rewrite("gain", gain, {"g": torch.ones(2)})]})]
    graph_snapshot(Pipeline(passes)(graph))

def test_guard(no_recompiles):
    compiled = torch.compile(lambda x, n: x * n, backend="eager")
    with no_recompiles():
        compiled(torch.ones(2), 2)
        compiled(torch.ones(2), CHANGED)
'''


def run_pytest(folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def test_a_project_that_only_installs_fxpeft(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(PROJECT.replace("CHANGED", "2"))
    code, text = run_pytest(tmp_path)
    assert code == 1
    assert "run pytest with --update to take it" in text
    assert "1 passed" in text
    assert run_pytest(tmp_path, "--update")[0] == 0
    snapshot = tmp_path / "snapshots" / "test_mine" / "test_graph.txt"
    assert "one = self.one(x)" in snapshot.read_text()
    assert run_pytest(tmp_path)[0] == 0

    file.write_text(PROJECT.replace("base(x) * g", "base(x) * g * g").replace("CHANGED", "3"))
    code, text = run_pytest(tmp_path)
    assert code == 1
    assert "2 failed" in text
    assert "+    mul_1 = mul * adapters_one_g" in text
    assert "RecompileError" in text


def test_the_plugin_costs_no_import_of_torch() -> None:
    program = "import sys, fxpeft.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
