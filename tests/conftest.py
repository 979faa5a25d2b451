"""Fixtures of all tests: fixed random numbers, one thread per process, no hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: the cores run other tests

from collections.abc import Iterator

import pytest
import torch

import fxpeft

torch.set_num_threads(1)

# tests across rooms; and those that look at the clock or kill at a moment
UNTRACED = ("compile", "hostile", "integrations", "peers", "test_patterns_that_hang.py", "test_saving.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Coverage is that of the rooms' own fast tests, of many cases the first: tracing all takes minutes."""
    if not config.pluginmanager.hasplugin("_cov"):
        return
    seen: set[tuple[object, object]] = set()
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        left_out = {item.path.parent.name, item.path.name} & {*UNTRACED}
        if test in seen or item.get_closest_marker("slow") or left_out:
            item.add_marker("no_cover")
        seen.add(test)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Dynamo has compiled nothing before, and keeps nothing of the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def installed() -> Iterator[None]:
    """fxpeft in Transformers' place of PEFT; afterwards Transformers is as it was."""
    fxpeft.install()
    yield
    fxpeft.uninstall()
