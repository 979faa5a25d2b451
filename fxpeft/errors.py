"""The errors of fxpeft. Each message names the site, what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable


class FxpeftError(Exception):
    """The root of the errors below, for whoever wants to catch them all."""


class AdapterError(FxpeftError, ValueError):
    """An adapter, config or checkpoint that can't be used; raised before anything was changed."""


class CheckpointError(AdapterError):
    """A file that is missing, damaged, foreign, or doesn't fit the model."""


class UnknownAdapter(AdapterError, LookupError):
    """A name that a store doesn't know."""


class PassError(FxpeftError, RuntimeError):
    """A pass met a graph it can't rewrite; the message names the site and what to do."""


class PatternError(FxpeftError, ValueError):
    """A text that is no pattern; the message shows the place. ``at``: the character, where it is known."""

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


class LockError(FxpeftError, RuntimeError):
    """A swap, or a backward across one, that can't be; raised before anything was changed."""


class LockTimeout(LockError, TimeoutError):
    """A forward or a swap that waited for others longer than ``prepare_hotswap(..., lock_timeout=)`` allows."""


class StoreTimeout(FxpeftError, TimeoutError):
    """A store that had no room, or didn't load an adapter, within its ``timeout``."""


def short(value: object, most: int = 200) -> str:
    """``repr``, cut in the middle where it is long; a string or list of any size is cut before."""
    if isinstance(value, str) and len(value) > most:
        value = value[:most] + value[-most:]
    if isinstance(value, list) and len(value) > most:
        value = value[:most]
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def clipped(text: str, most: int = 2000) -> str:
    """A message that may repeat what a stranger wrote, cut in the middle."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def listing(items: Iterable[object], most: int = 20) -> str:
    """One item a line, indented; a long list ends in a count of the rest."""
    lines = [f"  {item}" for item in items]
    rest = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *rest])
