"""Which PEFT is installed, for tests of what an older one lacks or does wrongly."""

from __future__ import annotations

import peft
import pytest

installed = tuple(int(part) for part in peft.__version__.split(".")[:2])
LORA_ONLY = 21, 'saves no biases with bias="lora_only"'
ALL_BIASES = 21, 'saves in_proj_bias of an attention too with bias="all"'
SCALINGS = 21, "multiplies by the scalings twice where it combines adapters by SVD"
EXPERTS = 19, "doesn't convert experts that were modules before Transformers 5"
STACKS = 19, "has A and B of a stack of experts the other way round"
TRANSFORMERS = 20, "lacks what Transformers asks of it"
LABELS = 20, "doesn't leave out masked labels in EVA"


def since(minor: int, why: str) -> pytest.MarkDecorator:
    """Skips a test where PEFT is older than ``0.minor``; ``why``: what that one does or lacks."""
    return pytest.mark.skipif(installed < (0, minor), reason=f"PEFT before 0.{minor} {why}")


def needs(minor: int, why: str) -> None:
    """The same, from within one of a test's cases."""
    if installed < (0, minor):
        pytest.skip(f"PEFT before 0.{minor} {why}")
