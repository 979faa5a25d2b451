"""A dict that forgets: caches that a server fills for ever stay as large as they were on the second day."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V]):
    """Keeps the entries that were set or asked for last.

    Args:
        limit: how many. A copy or a pickle of it keeps the default.
    """

    limit = 1024

    def __init__(self, *args: Any, limit: int | None = None) -> None:
        if limit is not None:
            self.limit = limit
        super().__init__(*args)

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self.limit:
            self.popitem(last=False)

    def recent(self, key: K) -> V | None:
        """The entry, which stays longer for it; ``None`` where there is none."""
        try:
            value = self[key]
            self.move_to_end(key)
        except KeyError:  # another thread may have taken it out in between
            return None
        return value
