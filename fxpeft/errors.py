"""The errors of fxpeft. Each message names the site, what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable


class AdapterError(ValueError):
    """An adapter, config or checkpoint that can't be used; raised before anything was changed."""


class CheckpointError(AdapterError):
    """A file that is missing, damaged, foreign, or doesn't fit the model."""


def listing(items: Iterable[object], most: int = 20) -> str:
    """One item a line, indented; a long list ends in a count of the rest."""
    lines = [f"  {item}" for item in items]
    rest = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *rest])
