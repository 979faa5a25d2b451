"""Runs checks one by one in a process of their own, so that one that hangs or breaks the device ends alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from fxpeft.tools.gpu_check.check import Check, Setting, Skipped
from fxpeft.tools.gpu_check.device import about

START = 180  # seconds that a new process may take to import everything and find the device
WHOLE = 8 * 60  # seconds for all checks; those that come after are skipped


@dataclass
class Result:
    """What became of a check.

    Args:
        status: ``passed``, ``failed`` or ``skipped``. seen: what it returned. reason: why it was skipped, or failed.
        trace: the traceback of an error. broken: the device or the process is of no more use after it.
    """

    name: str
    sentence: str
    limit: int
    status: str
    seconds: float = 0.0
    seen: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    trace: str = ""
    broken: bool = False

    @classmethod
    def of(cls, check: Check, status: str, **values: Any) -> Result:
        """The result of a check."""
        return cls(check.name, check.sentence, check.limit, status, **values)


def run_check(check: Check, setting: Setting) -> Result:
    """One check, in this process and without its limit; no error of it comes out."""
    if (why := check.why_not(setting)) is not None:
        return Result.of(check, "skipped", reason=why)
    start, values = time.perf_counter(), dict[str, Any]()
    try:
        values, status = {"seen": check.run(setting)}, "passed"
        setting.wait()
    except Skipped as skipped:
        status, values = "skipped", {"reason": str(skipped)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        text = " ".join(str(error).split())
        status, values = "failed", {"reason": f"{type(error).__name__}: {text}", "trace": traceback.format_exc()}
    return Result.of(check, status, seconds=time.perf_counter() - start, broken=not _tidied(setting), **values)


def _tidied(setting: Setting) -> bool:
    """Give memory back; says whether the device still answers."""
    torch.compiler.reset()
    gc.collect()
    try:
        setting.wait()
        if hasattr(setting.module, "empty_cache"):
            setting.module.empty_cache()
    except RuntimeError:
        return False
    return True


def run_here(checks: Sequence[Check], setting: Setting) -> Iterator[Result]:
    """Each check's result, all run in this process, without limits: for a debugger."""
    for check in checks:
        yield run_check(check, setting)


def run_apart(checks: Sequence[Check], setting: Setting, whole: float = WHOLE) -> Iterator[Result]:
    """Each check's result, run in another process, which is ended and started anew where one hangs or breaks it.

    Args:
        whole: seconds for all.
    """
    end, worker = time.monotonic() + whole, None
    try:
        for check in checks:
            if (why := check.why_not(setting)) is not None:
                yield Result.of(check, "skipped", reason=why)
                continue
            left = end - time.monotonic()
            if left <= 0:
                yield Result.of(check, "skipped", reason=f"the {whole:g} s for all checks were over")
                continue
            if worker is None:
                worker = _Worker(setting)
            result = worker.ask(check, min(check.limit, left))
            if result.broken:
                worker.stop()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """A process that runs checks, which are functions of modules."""

    def __init__(self, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process can't use an accelerator
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, setting))
        self.process.start()
        theirs.close()
        self.ready = False

    def ask(self, check: Check, limit: float) -> Result:
        """A check's result; ``failed`` where it takes too long or the process dies."""
        start = time.perf_counter()
        try:
            if not self.ready:
                if not self.pipe.poll(START):
                    return self._lost(check, start, f"no process could be started for it within {START} s")
                self.pipe.recv()
                self.ready, start = True, time.perf_counter()
            self.pipe.send(check)
            if not self.pipe.poll(limit):
                return self._lost(check, start, f"not done within its limit of {limit:.0f} s")
            found: Result = self.pipe.recv()
            return found
        except (EOFError, OSError):
            self.process.join(10)
            return self._lost(check, start, f"its process died, with exit code {self.process.exitcode}")

    def _lost(self, check: Check, start: float, why: str) -> Result:
        return Result.of(check, "failed", seconds=time.perf_counter() - start, reason=why, broken=True)

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Any, setting: Setting) -> None:
    os.dup2(2, 1)  # whatever a library prints is not the table's
    import_module("fxpeft.tools.gpu_check.checks")  # takes seconds, which are no check's
    about(setting.kind)  # starts the device
    pipe.send("ready")
    while True:
        try:
            check = pipe.recv()
        except EOFError:
            return
        pipe.send(run_check(check, setting))
