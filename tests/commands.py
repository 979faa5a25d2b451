"""``fxpeft``'s commands in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from fxpeft.tools.cli import app


def run(*arguments: object, code: int = 0) -> str:
    """What was printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def told(*arguments: object, code: int = 0) -> Any:
    """What a program reads of it."""
    return json.loads(run(*arguments, "--json", code=code))
