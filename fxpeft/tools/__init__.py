"""The command line."""

from fxpeft.tools.cli import main

__all__ = ["main"]
