"""The versions of other libraries that the whole suite ran on. Another warns once and goes on."""

from __future__ import annotations

import re
import warnings

#: library -> the first and the last minor release; examples/guides/versions.md has the runs
TRIED = {"torch": ("2.13", "2.15"), "transformers": ("5.23", "5.24")}


def warn_untried(library: str, version: str) -> None:
    """Warn where a version lies outside of those that were tried; called once, as a library is first imported.

    Args:
        version: as the library says it: ``"2.13.0+cpu"``, ``"2.16.0.dev20261101"``.
    """
    first, last = TRIED[library]
    if not minor(first) <= minor(version) <= minor(last):
        warnings.warn(
            f"{library} {version} was not tried with fxpeft; {first} to {last} were. Should something fail, "
            "try one of these",
            stacklevel=2,
        )


def minor(version: str) -> tuple[int, ...]:
    """``(2, 13)`` of ``"2.13.0+cpu"``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
