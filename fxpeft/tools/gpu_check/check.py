"""What a check is, what it is given, and what it says."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

COMPILER = "a C++ compiler"


@dataclass(frozen=True)
class Setting:
    """Where the checks run.

    Args:
        kind: the device's type, as ``cuda``. quick: tiny sizes, few rounds: does it run, not how fast.
    """

    kind: str
    quick: bool

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device(self.kind)

    @property
    def dtype(self) -> torch.dtype:
        """What models are served in: bfloat16, but on a CPU, whose kernels for it round elsewhere."""
        return torch.float32 if self.kind == "cpu" else torch.bfloat16

    @property
    def tiny(self) -> bool:
        """Whether models are those of tests."""
        return self.quick or self.kind == "cpu"

    @property
    def module(self) -> Any:
        """``torch.cuda`` or its like: streams, memory, ``synchronize``."""
        return torch.get_device_module(self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        self.module.synchronize()


class Skipped(Exception):
    """A check has nothing to say here, and why."""


@dataclass(frozen=True)
class Check:
    """One of them.

    Args:
        run: raises what is wrong, as an ``AssertionError`` where an output is; returns what it saw, as plain values.
            A value that is a mapping itself is a measurement, with a row of its own in the table.
        limit: seconds after which it is ended. needs: packages, or :data:`COMPILER`; without them it is skipped.
        on: the device's type, where no other can tell.
    """

    name: str
    sentence: str
    run: Callable[[Setting], dict[str, Any]]
    limit: int = 60
    needs: tuple[str, ...] = ()
    on: str | None = None

    def why_not(self, setting: Setting) -> str | None:
        """Why it can't run here, or ``None``."""
        if self.on is not None and setting.kind != self.on:
            return f"needs a device of type {self.on}"
        missing = [each for each in self.needs if not _there(each)]
        return f"needs {', '.join(missing)}, which is not installed" if missing else None


def _there(need: str) -> bool:
    if need == COMPILER:
        return any(shutil.which(each) for each in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    return importlib.util.find_spec(need) is not None
