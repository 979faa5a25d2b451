"""How many calls a piece of work makes: what grows with something shows in them without a clock."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FILLING = ("__subclasscheck__", "__subclasshook__")


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of Python functions and built-in ones.

    Those of the garbage collector's own are no part of the work, nor are those that fill the caches of abstract
    classes, which any import on the way empties.
    """
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_name not in FILLING

    collecting = gc.isenabled()
    gc.disable()
    try:
        with profiled(seen):
            work()
    finally:
        if collecting:
            gc.enable()
    return count


@contextmanager
def profiled(seen: Callable[[Any, str, Any], None]) -> Iterator[None]:
    """A block whose calls are told to ``seen``: the frame, the event and its argument, as ``sys.setprofile`` says."""
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)
