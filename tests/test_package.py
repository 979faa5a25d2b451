"""The package from outside: its names, its version, its command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from processes import python

import fxpeft


def test_every_public_name_is_there() -> None:
    assert all(getattr(fxpeft, name) is not None for name in fxpeft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        fxpeft.lora  # noqa: B018


def test_no_module_hides_a_function_of_a_package() -> None:
    """``fxpeft.integrations.transformers.install`` is the function, as it was before there was a package."""
    program = """
import fxpeft.integrations.transformers as package
from fxpeft.integrations.transformers import loading, saving, trainer
import fxpeft
assert package.install is fxpeft.install and callable(package.install)
assert package.uninstall is fxpeft.uninstall and callable(package.uninstall)
import fxpeft.programs.rewriting, fxpeft.programs.packaging
assert all(getattr(fxpeft.programs, name) is getattr(fxpeft, name) for name in fxpeft.programs.__all__)
assert {"Slots", "adapter_inputs", "eject", "rewrite"} <= set(fxpeft.programs.__all__)  # a module had them in 0.1.0
"""
    done = python("-c", program, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_command_tells_the_version() -> None:
    done = python("-m", "fxpeft", "--version", timeout=60)
    assert done.stdout.strip() == f"fxpeft {version('fxpeft')}"


def test_passes_know_nothing_of_fxpeft() -> None:
    program = "import sys, fxpeft.passes; print(sorted(m for m in sys.modules if m.startswith(('fxpeft.', 'peft'))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout
    assert "fxpeft.passes" in done.stdout
    names = done.stdout.strip("[]\n").replace("'", "").split(", ")
    assert all(name.startswith(("fxpeft.passes", "fxpeft.errors", "fxpeft.moved")) for name in names)
