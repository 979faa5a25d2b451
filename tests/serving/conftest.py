"""An adapter that serves, and one to swap to: other ranks, scales, targets, a module and biases."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import folder


@pytest.fixture
def old(tmp_path: Path) -> str:
    return folder(tmp_path / "old", 1, r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2})


@pytest.fixture
def new(tmp_path: Path) -> str:
    return folder(
        tmp_path / "new", 2, r=6, lora_alpha=11, target_modules=["v_proj", "down_proj"], alpha_pattern={"v_proj": 2},
        modules_to_save=["lm_head"], bias="lora_only",
    )  # fmt: skip
