"""What slots are declared for is checked alike wherever it is said, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpeft
from fxpeft import AdapterError, Slots


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).eval()


X = torch.ones(3, 6)
PLACES: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "live": lambda folder, said: fxpeft.prepare_hotswap(net(), targets=["0"], **said),
    "program": lambda folder, said: fxpeft.rewrite(torch.export.export(net(), (X,)), Slots(["0"], **said)),
    "package": lambda folder, said: fxpeft.package(net(), folder / "x.pt2", (X,), targets=["0"], **said),
}
WRONG = {
    "methods: expected a sequence of some of .*ia3, lora, .*adalora.*, found lola, dorra": {
        "methods": ("lora", "lola", "dorra")
    },
    "methods: expected a sequence of some of .*, found 'lora'": {"methods": "lora"},
    "max_rank: expected at least 2, found 1": {"max_rank": 1},
    "rank: expected 'dynamic' or 'static', found 'fixed'": {"rank": "fixed"},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_in_the_same_words(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{message}$"):
        PLACES[place](tmp_path, WRONG[message])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["program", "package"])
def test_what_has_slots_at_targets_only_serves_no_prompt(place: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"some of ia3, lora, .*found prompt_tuning"):
        PLACES[place](tmp_path, {"methods": ("lora", "prompt_tuning")})
    assert not any(tmp_path.iterdir())


def test_one_place_says_it() -> None:
    """The words are in one file of the library."""
    root = Path(fxpeft.__file__).parent
    for words in ("max_rank: expected at least", "methods: expected a sequence of some of", "rank: expected 'dynamic'"):
        files = [path.name for path in root.rglob("*.py") if words in path.read_text("utf-8")]
        assert files == ["declared.py"]
