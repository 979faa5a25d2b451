"""The guide's table of key layouts says what fxpeft's tests of them show, and what PEFT makes of the same files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import test_expert_layouts as experts
import test_key_layouts as keys
import torch
from torch import Tensor

import fxpeft

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "compatibility.md"
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
TEXT = "model.language_model.layers.0.self_attn.q_proj"


def outcome(load: Callable[[], Any], outputs: Callable[[Any], Tensor], expected: Tensor) -> str:
    """``loads``, ``other outputs`` or ``refused``."""
    try:
        model = load()
    except (ValueError, RuntimeError, KeyError):
        return "refused"
    return "loads" if torch.allclose(outputs(model), expected, atol=1e-4) else "other outputs"


def theirs(build: Callable[[], Any], folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(build(), folder).eval()


def mine(build: Callable[[], Any], folder: Path) -> Any:
    model = build()
    fxpeft.load_adapter(model, folder)
    return model


def both(build: Callable[[], Any], folder: Path, outputs: Callable[[Any], Tensor], expected: Tensor) -> tuple[str, str]:
    """What fxpeft and PEFT make of a file."""
    return (
        outcome(lambda: mine(build, folder), outputs, expected),
        outcome(lambda: theirs(build, folder), outputs, expected),
    )


def row(name: str, instance: str, found: dict[str, tuple[str, str]]) -> str:
    """A line of the table: one word for all models, or each word with its models."""
    cells = []
    for i in (0, 1):
        words = dict.fromkeys(pair[i] for pair in found.values())
        of = {word: ", ".join(n for n, pair in found.items() if pair[i] == word) for word in words}
        cells.append(", ".join(f"{word} ({names})" if len(words) > 1 else word for word, names in of.items()))
    return f"| {name} | {instance} | {cells[0]} | {cells[1]} |"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_what_the_tests_show(tmp_path: Path) -> None:
    rows = ["| layout | for instance | fxpeft | PEFT 0.21 |", "| --- | --- | --- | --- |"]
    for layout, rename in keys.LAYOUTS.items():
        found = {}
        for name, family in keys.MODELS.items():
            folder = tmp_path / layout / name
            expected = keys.write(folder, family)
            keys.renamed(folder, lambda key, family=family, rename=rename: rename(family, key))  # type: ignore[misc]
            found[name] = both(family.build, folder, partial(keys.logits, family=family), expected)
        instance = "<br>".join(f"`{rename(keys.MODELS['llava'], f'{key}.')[:-1]}`" for key in (TEXT, VISION))
        rows.append(row(layout, instance, found))
    for case, fields in experts.CASES.items():
        found = {}
        for name, family in experts.MODELS.items():
            folder = tmp_path / f"{case} {name}".replace(" ", "-")
            found[name] = both(family.build, folder, experts.logits, experts.write(folder, family, **fields))
        instance = "`model.layers.0.block_sparse_moe.experts.0.w1`" if case == "plain" else ""
        rows.append(row(f"a LoRA for each expert, {case}", instance, found))
    table = "\n".join(rows)
    assert table in GUIDE.read_text(encoding="utf-8"), table
