"""The pytest plugin: each tool passes where it should, and fails where it must."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_each
from processes import python
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft.passes import live
from fxpeft.passes.slots.copies import Copies
from fxpeft.serving.swap import Serving
from fxpeft.testing import (
    SwapReport,
    _every_pair,
    assert_single_graph,
    assert_swaps_clean,
    count_graphs,
    graph_text,
    no_recompiles,
)


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
    with no_recompiles() as counted:
        compiled(torch.ones(3))
        compiled(torch.zeros(3))
        assert counted.graphs == 1
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


def test_no_recompiles_sees_other_threads() -> None:
    """torch's config is that of one thread, so error_on_recompile alone says nothing of the others."""
    compiled = torch.compile(double, backend="eager")

    def call(factor: int) -> None:
        thread = threading.Thread(target=compiled, args=(torch.ones(3), factor))
        thread.start()
        thread.join()

    with no_recompiles() as counted:
        call(2)
        call(2)
    assert counted.graphs == 1
    with pytest.raises(torch._dynamo.exc.RecompileError, match=r"another thread recompiled double: .*factor == 2"):
        with no_recompiles():
            call(3)
    with no_recompiles():  # that one is past
        call(3)


def test_count_graphs_counts_graphs_and_breaks() -> None:
    with count_graphs() as one:
        assert one.graphs == 0
        torch.compile(double, backend="eager")(torch.ones(3))
        assert one.graphs == 1
    with count_graphs() as two:
        torch.compile(broken, backend="eager")(torch.ones(3))
    assert (one.graphs, one.breaks) == (1, ())
    assert two.graphs == 2
    assert two.breaks


def hidden(x: Tensor) -> Tensor:
    """A break where Dynamo can't resume: it skips this frame, and captures only what it calls."""
    with Path(__file__).open() as file:
        file.readline()
    return double(x)


@torch.compiler.disable
def uncompiled(x: Tensor) -> Tensor:
    return x + 1


def test_assert_single_graph() -> None:
    assert_single_graph(double, torch.ones(3), factor=3)
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, max_rank=4)
    with torch.no_grad():
        assert_single_graph(torch.compile(model), token_ids(), use_cache=False)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (broken, r"makes 2 of it\.\n.*graph_break"),
        (hidden, r"makes 1 of it\.\n"),
        (lambda x: uncompiled(x) * 2, r"makes 1 of it\.\n.*disable"),
        (lambda x: x, "found 1 with 0 operations"),
    ],
    ids=["break", "skipped-frame", "disabled", "empty"],
)
def test_assert_single_graph_names_what_breaks_it(function: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_single_graph(function, torch.ones(3))


def test_a_function_that_raises_is_no_graph_break() -> None:
    with pytest.raises(Exception, match="shape") as caught:
        assert_single_graph(lambda x: x.view(2, 2), torch.ones(3))
    assert not isinstance(caught.value, AssertionError)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    configs = {
        "0": fxpeft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"]),
        "1": fxpeft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear"),
    }
    return [*save_each(tiny_llama, configs, tmp_path).values()]


def swaps_clean(folders: list[str], model: nn.Module | None = None, **options: Any) -> SwapReport:
    inputs = {"input_ids": token_ids(), "use_cache": False}
    settings = {"max_rank": 8, "compile_options": {"backend": "eager"}, "atol": 1e-5, **options}
    return assert_swaps_clean(model or tiny_llama(), folders, inputs, **settings)


def test_assert_swaps_clean_runs_the_matrix(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = [type(m) for m in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    walked: list[str] = []
    for name in ("set_adapter", "hotswap", "disable_adapters", "enable_adapters", "set_scale"):
        real = getattr(fxpeft, name)
        monkeypatch.setattr(fxpeft, name, lambda *a, real=real, name=name: (walked.append(name), real(*a))[1])
    report = swaps_clean(folders, model, compile_options={"backend": "aot_eager"})
    assert (report.graphs, report.swaps) == (1, 12)  # off, a and b: six ordered pairs, in two ways
    assert report.max_difference < 1e-5
    assert {n: walked.count(n) for n in ("set_adapter", "hotswap", "set_scale")} == {
        "set_adapter": 4, "hotswap": 4, "set_scale": 6,
    }  # fmt: skip
    assert [type(m) for m in model.modules()] == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_every_pair_is_walked_once() -> None:
    for n in range(2, 6):
        pairs = list(pairwise(_every_pair(n)))
        assert sorted(pairs) == [(i, j) for i in range(n) for j in range(n) if i != j]
        assert (pairs[0][0], pairs[-1][1]) == (0, 0)


class Odd(nn.Module):
    """Outputs of which one is infinite, one empty; a buffer that is replaced in each call; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls = self.calls + 0
        y = nn.functional.dropout(self.second(self.first(x)), training=self.training)
        return {"y": (y, y > 0), "mask": torch.full((2,), float("-inf")), "none": x[:0]}


OddNet = tuple[nn.Module, dict[str, str]]


@pytest.fixture
def odd(tmp_path: Path) -> OddNet:
    """The net, and three adapters of it: ``a``, ``b`` and one that does nothing, ``zero``."""
    model = Odd().eval()
    for seed, name in enumerate(("a", "b", "zero")):
        changed = copy.deepcopy(model)
        fxpeft.add_adapter(changed, fxpeft.LoraConfig(r=2, target_modules="all-linear"))
        if name != "zero":
            randomise(fxpeft.adapter_state_dict(changed).values(), seed=seed, scale=1.0)
        fxpeft.save_adapter(changed, tmp_path / name)
    return model, {name: str(tmp_path / name) for name in ("a", "b", "zero")}


def odd_clean(odd: OddNet, *names: str, **options: Any) -> SwapReport:
    folders = [odd[1][name] for name in names]
    inputs = [torch.linspace(-1, 1, 15).view(5, 3)]
    return assert_swaps_clean(odd[0], folders, inputs, compile_options={"backend": "eager"}, **options)


def test_assert_swaps_clean_takes_any_output_and_buffers_of_the_base(odd: OddNet) -> None:
    report = odd_clean(odd, "a")
    assert (report.graphs, report.swaps) == (1, 4)


def test_assert_swaps_clean_refuses_what_it_could_not_judge(odd: OddNet) -> None:
    with pytest.raises(ValueError, match="at least one folder"):
        odd_clean(odd)
    with pytest.raises(ValueError, match="zero and off give the same output"):
        odd_clean(odd, "a", "zero")
    with pytest.raises(ValueError, match=r"a and \S+a give the same output"):
        odd_clean(odd, "a", "a")
    odd[0].train()
    with pytest.raises(ValueError, match=r"another output for each call; call eval"):
        odd_clean(odd, "a")


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (Serving, "rescale", r"a: set_scale to 0.5: the output differs"),
        (fxpeft, "hotswap", r"off -> \S+a \(hotswap\): the output differs|a -> \S+b \(hotswap\): the output differs"),
        (fxpeft, "enable_adapters", r"off -> \S+a \(set_adapter\): the output differs"),
        (fxpeft, "set_adapter", r"off -> \S+a \(set_adapter\): the output differs"),
    ],
    ids=["set_scale", "hotswap", "enable_adapters", "set_adapter"],
)
def test_assert_swaps_clean_notices_a_call_that_does_nothing(
    odd: OddNet, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, message: str
) -> None:
    odd_clean(odd, "a", "b")
    monkeypatch.setattr(owner, name, lambda *args: None)
    with pytest.raises(AssertionError, match=message):
        odd_clean(odd, "a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.register_buffer("left", torch.zeros(1)), "other keys"),
        (lambda model: model.second.weight.data.mul_(1 + 1e-6), r"base changed: second\.weight"),
        (lambda model: model.first.train(), "training was switched: first"),
    ],
    ids=["key", "weight", "training"],
)
def test_assert_swaps_clean_notices_a_changed_base(
    odd: OddNet, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    real = fxpeft.prepare_hotswap

    def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        change(model)

    monkeypatch.setattr(fxpeft, "prepare_hotswap", prepare)
    with pytest.raises(AssertionError, match=message):
        odd_clean(odd, "a")


def test_assert_swaps_clean_notices_a_moved_slot(odd: OddNet, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fxpeft.set_adapter

    def moving(model: nn.Module, name: str) -> None:
        real(model, name)
        slot: Any = model.get_submodule("first.slot")
        slot.a = slot.a.clone()

    monkeypatch.setattr(fxpeft, "set_adapter", moving)
    with pytest.raises(AssertionError, match=r"off -> \S+a \(set_adapter\): moved in memory: first\.slot\.a$"):
        odd_clean(odd, "a")


def test_assert_swaps_clean_names_a_wrong_swap(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def forgetful(self: Copies) -> None:
        calls.append(1)
        if len(calls) < 4:  # preparing makes three
            whole(self)

    whole = Copies.run
    monkeypatch.setattr(Copies, "run", forgetful)
    expected = r"off -> \S+0 \(set_adapter\): the output differs from .*\n(.*\n)*Greatest absolute difference: \d"
    with pytest.raises(AssertionError, match=expected):
        swaps_clean(folders)


def test_assert_swaps_clean_notices_a_recompile(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # the active rank's size becomes a constant of the graph, as that of any tensor would
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match=r"-> \S+ \(set_adapter\): recompiled: [\s\S]*carrier' size mismatch"):
        swaps_clean(folders)


PROJECT = """
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
"""


def run_pytest(folder: Path, *options: str) -> tuple[int, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # CI's are not the project's
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, folder, timeout=120, cwd=folder, env=own)
    return done.returncode, done.stdout + done.stderr


def test_a_project_that_only_installs_fxpeft(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(PROJECT.replace("CHANGED", "2"))
    code, text = run_pytest(tmp_path)
    assert code == 1
    assert "run pytest with --fxpeft-update to take it" in text
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


SNAPSHOTS = """
import pytest

class TestOne:
    def test_it(self, graph_snapshot):
        graph_snapshot("one")
        graph_snapshot("one again")

class TestTwo:
    def test_it(self, graph_snapshot):
        graph_snapshot("two")

@pytest.mark.parametrize("text", ["a/b", "a:b", "a-b", "1.5"])
def test_it(text, graph_snapshot):
    graph_snapshot(text)
"""


def test_each_test_has_a_snapshot_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(SNAPSHOTS)
    assert run_pytest(tmp_path, "--fxpeft-update")[0] == 0
    assert run_pytest(tmp_path)[0] == 0
    found = [file.read_text() for file in (tmp_path / "snapshots" / "test_mine").iterdir()]
    assert sorted(found) == ["1.5\n", "a-b\n", "a/b\n", "a:b\n", "one\n", "one again\n", "two\n"]
    assert (tmp_path / "snapshots" / "test_mine" / "TestOne.test_it-2.txt").exists()


def test_update_stays_with_a_project_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_it(graph_snapshot):\n    graph_snapshot('text')\n")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--update', action='store_true', help='theirs')\n"
    )
    code, text = run_pytest(tmp_path, "--update")
    assert code == 1
    assert "no snapshot" in text
    assert run_pytest(tmp_path, "--fxpeft-update")[0] == 0
    assert run_pytest(tmp_path)[0] == 0


def test_graph_text_of_everything_that_has_a_graph() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    traced = torch.fx.symbolic_trace(net)
    assert graph_text(traced) == graph_text(traced.graph)
    assert "linear" in graph_text(torch.export.export(net, (torch.ones(1, 3),)))
    fxpeft.prepare_hotswap(net, 4)
    assert graph_text(net[0]) == live.generated_source(net[0])
    with pytest.raises(TypeError, match="found Identity"):
        graph_text(nn.Identity())


def test_the_functions_work_without_pytest() -> None:
    program = "import sys; sys.modules['pytest'] = None; from fxpeft.testing import count_graphs"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_plugin_costs_no_import_of_torch() -> None:
    program = "import sys, fxpeft.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
