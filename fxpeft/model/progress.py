"""A bar for walks over many sites, where they last."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
MANY = 500  # sites; fewer take no time
AFTER = 2.0  # seconds, until a bar is shown


def progress(items: Collection[T], what: str) -> Iterable[T]:
    """The items; a terminal shows how many are done once that takes over two seconds.

    ``HF_HUB_DISABLE_PROGRESS_BARS=1`` and ``huggingface_hub.utils.disable_progress_bars()`` switch it off.
    """
    if len(items) < MANY:
        return items
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    bar: Any = tqdm  # it has no types
    made: Iterable[T] = bar(items, desc=what, unit=" sites", delay=AFTER, leave=False, disable=None)
    return made
