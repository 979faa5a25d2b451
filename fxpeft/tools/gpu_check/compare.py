"""Whose output is this? Each adapter's output by its own training subgraph is known; nothing may lie between two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}  # of the whole output's norm


def apart(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of ``wanted``; NaN where a number is one."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()))


class Outputs:
    """What each name has to give.

    Raises:
        AssertionError: two of them are so near that a wrong one would pass for the right one.
    """

    def __init__(self, wanted: Mapping[str, Tensor], tolerance: float) -> None:
        self.wanted, self.tolerance, self.worst = dict(wanted), tolerance, 0.0
        names = list(self.wanted)
        for i, name in enumerate(names):
            for other in names[:i]:
                if not apart(self.wanted[name], self.wanted[other]) > 4 * tolerance:
                    raise AssertionError(f"{name} and {other} give the same output: a wrong swap would not be seen")

    def expect(self, found: Tensor, name: str, when: str) -> None:
        """Assert that an output is that of one name.

        Raises:
            AssertionError: it is not; says how far it is from every name's.
        """
        distance = apart(found, self.wanted[name])
        if distance <= self.tolerance:
            self.worst = max(self.worst, distance)
            return
        others = ", ".join(f"{distance:.3g} from {other}" for other, distance in self.distances(found).items())
        raise AssertionError(f"{when}: expected {name}'s output within {self.tolerance:g}; it is {others}")

    def expect_one(self, found: Tensor, when: str) -> str:
        """Assert that an output is that of some name, and which.

        Raises:
            AssertionError: it lies between them.
        """
        distances = self.distances(found)
        nearest = min(distances, key=lambda name: distances[name] if distances[name] == distances[name] else torch.inf)
        self.expect(found, nearest, f"{when}: a mixture")
        return nearest

    def distances(self, found: Tensor) -> dict[str, float]:
        """How far an output is from each name's."""
        return {name: apart(found, wanted) for name, wanted in self.wanted.items()}
