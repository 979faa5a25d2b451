"""The command for a GPU, on a CPU: what it says without a GPU, that its checks run, and that they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS, python
from typer.testing import CliRunner

import fxpeft
from fxpeft.methods import slot_needs
from fxpeft.passes.slots.copies import Copies
from fxpeft.tools.cli import app
from fxpeft.tools.gpu_check.check import Check, Setting, Skipped
from fxpeft.tools.gpu_check.checks import CHECKS
from fxpeft.tools.gpu_check.compare import Outputs
from fxpeft.tools.gpu_check.methods import CASES
from fxpeft.tools.gpu_check.running import run_apart, run_check

CPU = Setting("cpu", quick=True)
NAMES = [check.name for check in CHECKS]
COMPILING = ("reduce-overhead", "generate", "compiled", "compiled-methods", "compiled-layers", "fold", "package",
             "speed-forward", "max-autotune")  # fmt: skip
BY_HAND = {"reduce-overhead", "generate", "compiled-methods", "fold", "speed-forward", "max-autotune"}  # over a minute


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "fxpeft.gpu_check", *arguments)


def here(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["gpu-check", "--device", "cpu", "--quick", "--here", *map(str, arguments)])


def named(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_is_skipped_in_sight(tmp_path: Path) -> None:
    """The command as CI runs it."""
    done = process("--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no GPU: every check is skipped.")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [check["name"] for check in found["checks"]] == NAMES
    assert {check["status"] for check in found["checks"]} == {"skipped"}
    assert (found["passed"], found["failed"], found["skipped"], found["device"]) == (0, 0, len(NAMES), None)
    for name in NAMES:
        assert f"| {name} | skipped |  | there is no GPU |" in done.stdout


@pytest.mark.slow
def test_a_dry_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = process("--device", "cpu", "--quick", "--only", "method-dora", "--only", "cuda-*", "--only", "speed-swap",
                   "--json", file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found) == ["format", "device", "versions", "quick", "passed", "failed", "skipped", "seconds", "checks"]
    assert found["device"]["kind"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["fxpeft"] == fxpeft.__version__
    assert [(c["name"], c["status"]) for c in found["checks"]] == [
        ("method-dora", "passed"), ("cuda-graph", "skipped"), ("speed-swap", "passed"),
    ]  # fmt: skip
    assert all(set(c) >= {"sentence", "limit", "seconds", "seen", "reason", "trace"} for c in found["checks"])
    rows = {name: row for name, row in found["checks"][2]["seen"].items() if isinstance(row, dict)}
    assert {"one copy of the bytes", "set_adapter", "hotswap from memory", "hotswap from a folder"} <= rows.keys()
    assert all(row["low"] <= row["ms"] <= row["high"] and row["GB/s"] > 0 for row in rows.values())
    assert "| cuda-graph | skipped |  | needs a device of type cuda |" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout.splitlines()[0]
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in COMPILING else ()) for n in NAMES if n not in BY_HAND]
)
def test_a_check_passes_here(name: str) -> None:
    result = run_check(named(name), CPU)
    if result.status == "skipped":
        assert result.reason.startswith("needs ")
    else:
        assert result.status == "passed", result.trace
        assert result.seen


def half(copies: Copies) -> None:
    """A swap that writes every second tensor only."""
    for to, source in copies.pairs[::2]:
        to.copy_(source)


def test_a_swap_that_mixes_fails_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Copies, "run", half)
    result = here("--only", "swap-waits", "--only", "threads", "--only", "method-lora", "--json", tmp_path / "f.json")
    assert result.exit_code == 1
    found = {check["name"]: check for check in json.loads((tmp_path / "f.json").read_text())["checks"]}
    assert {name: check["status"] for name, check in found.items()} == dict.fromkeys(found, "failed")
    assert len(found) == 3
    assert "AssertionError: output 0: a mixture: expected" in found["threads"]["reason"]
    assert "| threads | failed |" in result.stdout
    assert "0 passed, 3 failed, 0 skipped" in result.stdout


def test_a_swap_that_comes_late_is_the_forwards_that_was_called_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a forward had read the slots after the swap: its output is the new adapter's, whole."""
    from fxpeft.tools.gpu_check import streams

    real, late = streams.logits, list[Any]()

    def logits(model: Any, ids: Any) -> Any:
        found = real(model, ids)
        late.append(found)
        if len(late) % 2 == 0:  # after the swap: what came before it is the same
            late[-2].copy_(found)
        return found

    monkeypatch.setattr(streams, "logits", logits)
    result = run_check(named("swap-waits"), CPU)
    assert result.status == "failed"
    assert "set_adapter, turn 0: a forward that was called before the swap: expected wide's output" in result.reason


def passes(setting: Setting) -> dict[str, Any]:
    return {"device": str(setting.device)}


def hangs(setting: Setting) -> dict[str, Any]:
    time.sleep(300)
    return {}


def dies(setting: Setting) -> dict[str, Any]:
    os._exit(3)


def skips(setting: Setting) -> dict[str, Any]:
    raise Skipped("no reason")


def raises(setting: Setting) -> dict[str, Any]:
    raise ValueError("one | two\nthree")


@pytest.fixture(scope="module")
def apart() -> dict[str, Any]:
    checks = [Check(f.__name__, "A sentence.", f) for f in (dies, passes, raises, skips)]
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.get_context", lambda method: FORKS)  # sooner there; the dry run spawns its own
        found = {result.name: result for result in run_apart([*checks, Check("hangs", "", hangs, limit=2)], CPU)}
    assert time.monotonic() - start < 200
    return found


@pytest.mark.slow
def test_what_hangs_or_dies_ends_alone(apart: dict[str, Any]) -> None:
    assert {name: result.status for name, result in apart.items()} == {
        "dies": "failed", "passes": "passed", "raises": "failed", "skips": "skipped", "hangs": "failed",
    }  # fmt: skip
    assert apart["dies"].reason == "its process died, with exit code 3"
    assert apart["hangs"].reason == "not done within its limit of 2 s"
    assert apart["raises"].reason == "ValueError: one | two three"
    assert "in raises" in apart["raises"].trace
    assert apart["skips"].reason == "no reason"
    assert apart["passes"].seen == {"device": "cpu"}


def test_after_eight_minutes_the_rest_is_skipped() -> None:
    results = [*run_apart([Check("passes", "", passes)], CPU, whole=0)]
    assert [(r.status, r.reason) for r in results] == [("skipped", "the 0 s for all checks were over")]


def test_each_method_of_the_package_has_a_check() -> None:
    own = {name for name in slot_needs() if name != "own"}  # what another test registers
    assert set(CASES) == own
    assert {f"method-{name.replace('_', '-')}" for name in CASES} <= set(NAMES)


def test_names_are_unique_and_say_what_they_check() -> None:
    assert len(set(NAMES)) == len(NAMES)
    listed = CliRunner().invoke(app, ["gpu-check", "--list"]).stdout.splitlines()
    assert [line.partition(":")[0] for line in listed] == NAMES
    assert all(check.sentence.endswith(".") and f"at most {check.limit} s" in line
               for check, line in zip(CHECKS, listed, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--only", "swop"], "only='swop'"), (["--device", "tpu9"], "expected cpu")]
)
def test_a_wrong_question_is_exit_code_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["gpu-check", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_outputs_that_are_too_near_tell_nothing() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001])
    with pytest.raises(AssertionError, match="b and a give the same output"):
        Outputs({"a": a, "b": b}, 1e-2)
    outputs = Outputs({"a": a, "b": -a}, 1e-2)
    assert outputs.expect_one(a + 1e-3, "now") == "a"
    with pytest.raises(AssertionError, match=r"now: a mixture: expected a's output .* 1.17 from b"):
        outputs.expect_one(torch.tensor([1.0, -2.0]) * 0.5 + a * 0.4, "now")
    with pytest.raises(AssertionError, match="nan from a"):
        outputs.expect(a * float("nan"), "a", "now")
