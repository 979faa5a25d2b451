"""Every test here runs with fxpeft installed in Transformers, and leaves Transformers as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fxpeft


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    fxpeft.install()
    yield
    fxpeft.uninstall()
