"""The example of a method of one's own, run as a user would."""

from __future__ import annotations

import re
from pathlib import Path

from processes import python

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"


def test_a_method_of_ones_own_trains_and_shares_a_graph_with_lora() -> None:
    done = python(EXAMPLE)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 3
    assert losses[2] < 0.5 * losses[0]
    away = [float(value) for value in re.findall(r"(\S+) away", done.stdout)]
    assert len(away) == 2
    assert max(away) < 1e-5
