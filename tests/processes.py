"""Processes that start at once: forks of one that has imported torch and Transformers, and nothing of fxpeft."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._inductor.compile_fx", "torch.distributed.fsdp", "transformers.trainer"])


def python(
    *arguments: object, timeout: float = 300, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` returns and prints, as of ``subprocess.run``; ``-c CODE``, ``-m MODULE`` or a script.

    Not for a test of what is imported, or of what torch reads from the environment while it is imported.
    """
    given = [str(each) for each in arguments]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        child = FORKS.Process(target=_python, args=(given, cwd or Path.cwd(), env or {**os.environ}, files))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(given, timeout, *(file.read_bytes() for file in files))
        return subprocess.CompletedProcess(given, child.exitcode, *(file.read_text("utf-8") for file in files))


def start(*arguments: object, log: Path, env: dict[str, str] | None = None) -> BaseProcess:
    """A process that runs on, as of :func:`python`; what it prints is in ``log``, and beside it with ``.out``.

    It ends with this one at the latest.
    """
    given = [str(each) for each in arguments]
    files = [log.with_suffix(".out"), log]
    child = FORKS.Process(target=_python, args=(given, Path.cwd(), env or {**os.environ}, files), daemon=True)
    child.start()
    return child


def _python(arguments: list[str], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, 1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    gc.freeze()  # what was imported before the fork is no garbage
    match arguments:
        case ["-m", module, *rest]:
            sys.path[0], sys.argv = str(cwd), [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.path[0], sys.argv = "", ["-c", *rest]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(code, main.__dict__)
        case [script, *rest]:
            sys.path[0], sys.argv = str(Path(script).parent), [script, *rest]
            runpy.run_path(script, run_name="__main__")
