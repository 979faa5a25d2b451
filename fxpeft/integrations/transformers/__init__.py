"""Transformers' own adapter methods, answered by fxpeft."""

from fxpeft.integrations.installing import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
