"""Every test here runs with fxpeft installed in Transformers, and leaves Transformers as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fxpeft


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    torch._dynamo.reset()  # graphs of an earlier test's model would count as recompiles
    fxpeft.install()
    yield
    fxpeft.uninstall()
