"""Every test here runs with fxpeft installed in Transformers; graphs of an earlier test's model would be recompiles."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _installed(fresh_graphs: None, installed: None) -> None:
    """The fixtures of all tests."""
