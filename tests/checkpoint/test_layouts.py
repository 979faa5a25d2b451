"""Every layout of an adapter's files, every way to load it; what passes becomes the table in the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from layouts import ROWS, Row
from peer_versions import needs, since
from torch import Tensor

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.methods import method_of

pytestmark = pytest.mark.filterwarnings("ignore")
GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "compatibility.md"


@torch.no_grad()
def output(row: Row, model: Any) -> Tensor:
    return row.run(model)


def loads(row: Row, folder: Path, wanted: Tensor) -> None:
    model = row.wrap(row.base())
    fxpeft.load_adapter(model, folder)
    assert_close(output(row, row.after(model)), wanted)


def slots(row: Row, folder: Path, wanted: Tensor) -> None:
    """Into slots that were declared before, switched off to the bare model, and on again."""
    known = row.base()
    fxpeft.load_adapter(known, folder)
    config = fxpeft.adapter_config(known)
    method = method_of(config)
    targets: dict[str, Any] = {"num_virtual_tokens": getattr(config, "num_virtual_tokens", None)}
    if method.targeted:
        parameters = getattr(config, "target_parameters", None)
        targets = {"targets": config.target_modules or [], "target_parameters": parameters}
    model = row.wrap(row.base())
    fxpeft.prepare_hotswap(
        model, 8, methods=(method.declared(config),), modules_to_save=state_of(known).adapters["default"].plan.saved,
        bias=getattr(config, "bias", "none"), **targets,
    )  # fmt: skip
    fxpeft.load_adapter(model, folder)
    assert_close(output(row, model), wanted)
    with fxpeft.disabled(model):
        assert_close(output(row, model), output(row, row.base()))
    fxpeft.hotswap(model, folder)
    assert_close(output(row, model), wanted)


def transformers(row: Row, folder: Path, wanted: Tensor) -> None:
    """``model.load_adapter`` after ``fxpeft.install()``, every key accounted for."""
    fxpeft.install()
    try:
        model = row.wrap(row.base())
        info = model.load_adapter(str(folder))
        assert not info.missing_keys
        assert not info.unexpected_keys
        assert_close(output(row, model), wanted)
    finally:
        fxpeft.uninstall()


def writes(row: Row, folder: Path, wanted: Tensor) -> None:
    """Saved again, PEFT reads it."""
    model = row.wrap(row.base())
    fxpeft.load_adapter(model, folder)
    fxpeft.save_adapter(model, folder / "again")
    assert_close(output(row, peft.PeftModel.from_pretrained(row.base(), str(folder / "again")).eval()), wanted)


CHECKS: dict[str, tuple[str, Callable[[Row, Path, Tensor], None]]] = {
    "L": ("`load_adapter`", loads), "S": ("slots", slots), "T": ("Transformers", transformers), "W": ("saved", writes),
}  # fmt: skip
passed: dict[tuple[str, str], str] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


CASES = [(group, name) for group, rows in ROWS.items() for name in rows]


def run(group: str, name: str, folder: Path) -> None:
    """All checks of one row; what passes is noted."""
    row, done = ROWS[group][name], ""
    wanted = row.write(folder)
    bare = output(row, row.base())
    assert wanted.shape != bare.shape or (wanted.float() - bare).abs().max() > 0.01
    for letter, (_, check) in CHECKS.items():
        if letter not in row.skips:
            check(row, folder, wanted)
            done += letter
    passed[group, name] = done


@pytest.mark.parametrize(("group", "name"), CASES)
def test_layout(group: str, name: str, tmp_path: Path) -> None:
    needs(*ROWS[group][name].since)
    run(group, name, tmp_path)


def test_what_is_left_out_has_a_reason() -> None:
    assert all(row.why for rows in ROWS.values() for row in rows.values() if row.skips)


def table() -> str:
    """The guide's tables of what passed."""
    lines: list[str] = []
    titles = [title for title, _ in CHECKS.values()]
    for group, rows in ROWS.items():
        lines += ["", f"| {group} | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for name in rows:
            cells = ["yes" if letter in passed[group, name] else "" for letter in CHECKS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


@since(*max(row.since for rows in ROWS.values() for row in rows.values()))
def test_the_table_in_the_guide_says_what_passed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for i, (group, name) in enumerate(CASES):
        if (group, name) not in passed:  # this test alone was asked for
            (tmp_path / str(i)).mkdir()
            run(group, name, tmp_path / str(i))
    text, start, end = GUIDE.read_text(encoding="utf-8"), "<!-- layouts -->\n", "\n<!-- end layouts -->"
    before, _, rest = text.partition(start)
    found, marker, after = rest.partition(end)
    assert marker
    if request.config.getoption("--fxpeft-update"):
        GUIDE.write_text(before + start + table() + end + after, encoding="utf-8")
        found = table()
    assert found == table()


def test_a_table_that_says_more_than_passed_is_noticed() -> None:
    row = CASES[0]
    kept = passed.pop(row, "LSTW")
    for case in CASES:
        passed.setdefault(case, "LSTW")
    passed[row] = "L"
    assert table() not in GUIDE.read_text(encoding="utf-8")
    passed[row] = kept
