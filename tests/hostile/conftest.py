"""Adapters in files, and what each gives when freshly loaded, for the tests of locks and swaps."""

from __future__ import annotations

import pytest
from swapping import fresh, prepared, write_adapters
from torch import Tensor, nn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def outputs(folders: dict[str, str]) -> dict[str, Tensor]:
    return {name: fresh(folder) for name, folder in folders.items()}


@pytest.fixture
def model(folders: dict[str, str]) -> nn.Sequential:
    return prepared(folders, lock_timeout=30)
