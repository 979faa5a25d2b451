"""What an accelerator has to show of fxpeft's promises: checks one by one, a table of them, and JSON."""

from fxpeft.tools.gpu_check.command import gpu_check

__all__ = ["gpu_check"]
