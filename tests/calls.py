"""How many calls a piece of work makes: what grows with something shows in them without a clock."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FILLING = ("__subclasscheck__", "__subclasshook__")


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of Python functions and built-in ones, in all."""
    return calls_by_function(work).total()


def calls_by_function(work: Callable[[], Any]) -> Counter[str]:
    """Calls of Python functions and built-in ones, by the function: of a built-in one, that which called it.

    Those of the garbage collector's own are no part of the work, nor are those that fill the caches of abstract
    classes, which any import on the way empties.
    """
    found: Counter[str] = Counter()

    def seen(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_name not in FILLING:
            code = frame.f_code
            found[f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"] += 1

    collecting = gc.isenabled()
    gc.disable()
    try:
        with profiled(seen):
            work()
    finally:
        if collecting:
            gc.enable()
    return found


@contextmanager
def profiled(seen: Callable[[Any, str, Any], None]) -> Iterator[None]:
    """A block whose calls are told to ``seen``: the frame, the event and its argument, as ``sys.setprofile`` says."""
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)
