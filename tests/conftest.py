"""Fixtures of all tests: fixed random numbers, one thread per process, no hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: the cores run other tests
# a package's code around its kernels: a test calls it a few times, and compiling it is half of the test
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import atexit
import gc
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxpeft

torch.set_num_threads(1)

# g++ looks here for its linker: of each of hundreds of kernels, linking takes a third, and gold half of that
if (gold := shutil.which("ld.gold")) and "COMPILER_PATH" not in os.environ:
    os.environ["COMPILER_PATH"] = tempfile.mkdtemp(prefix="fxpeft-linker-")
    Path(os.environ["COMPILER_PATH"], "ld").symlink_to(gold)
    atexit.register(shutil.rmtree, os.environ["COMPILER_PATH"])

# tests across rooms; and those that look at the clock or kill at a moment
UNTRACED = ("compile", "hostile", "integrations", "peers", "test_patterns_that_hang.py", "test_saving.py")


def pytest_configure(config: pytest.Config) -> None:
    """xdist keeps the order of the files, instead of starting those of one long test last and alone."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, then those with the most tests: what is long starts early.

    Coverage is that of the rooms' own fast tests, of many cases the first: tracing all takes minutes.
    """
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))
    if not config.pluginmanager.hasplugin("_cov"):
        return
    seen: set[tuple[object, object]] = set()
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        left_out = {item.path.parent.name, item.path.name} & {*UNTRACED}
        if test in seen or item.get_closest_marker("slow") or left_out:
            item.add_marker("no_cover")
        seen.add(test)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now is no garbage: to look through it, again and again, was a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _compilers() -> None:
    """PEFT's BOFT looks for an extension, and where it finds none leaves gcc as the compiler of C++ behind."""
    if (boft := sys.modules.get("peft.tuners.boft.layer")) is not None:
        boft.get_fbd_cuda = lambda: None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Dynamo has compiled nothing before, and keeps nothing of the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def known_processor() -> None:
    """Inductor has found out what the processor can, by compiling: it does not once more in a test's own cache."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    pick_vec_isa()


@pytest.fixture
def installed() -> Iterator[None]:
    """fxpeft in Transformers' place of PEFT; afterwards Transformers is as it was."""
    fxpeft.install()
    yield
    fxpeft.uninstall()
