"""Walks over many sites show how far they are, in a terminal, where they last; elsewhere nothing is printed."""

from __future__ import annotations

import io
import sys

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch import nn

import fxpeft
from fxpeft.model import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def walk() -> None:
    """Adding to a thousand sites, and their slots."""
    model = nn.Sequential(*(nn.Linear(2, 3) for _ in range(1000)))
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=1, target_modules="all-linear"))
    fxpeft.prepare_hotswap(model, 2, targets="all-linear")


@pytest.mark.parametrize(("after", "shown"), [(0.0, True), (1000.0, False)])
def test_a_walk_that_lasts_is_shown(after: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", after)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    walk()
    for what in ("first values", "rewriting", "slots"):
        assert (f"{what}:" in terminal.getvalue()) == shown
    assert ("/1000 [" in terminal.getvalue()) == shown


def test_no_terminal_and_no_wish_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    walk()
    assert file.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    disable_progress_bars()
    try:
        walk()
    finally:
        enable_progress_bars()
    assert terminal.getvalue() == ""
