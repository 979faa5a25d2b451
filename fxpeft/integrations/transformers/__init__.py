"""Transformers' own adapter methods, answered by fxpeft."""

from fxpeft.integrations.transformers.patch import install, uninstall

__all__ = ["install", "uninstall"]
