"""Whole programs: exported, packaged, compiled by a backend of their own."""

from fxpeft.programs.backend import compile
from fxpeft.programs.packaged import Package, open_package
from fxpeft.programs.packaging import package
from fxpeft.programs.rewrites import Slots
from fxpeft.programs.rewriting import adapter_inputs, eject, rewrite

__all__ = ["Package", "Slots", "adapter_inputs", "compile", "eject", "open_package", "package", "rewrite"]
