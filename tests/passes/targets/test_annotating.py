"""The passes that only annotate, match and roles: what they mark, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import FORMS, IDS, SITES, snapshot
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import MatchPass, Pipeline, RolePass, pattern
from fxpeft.passes.base import GraphPass
from fxpeft.passes.meta import ROLE, TARGET

PASSES: dict[str, Callable[[], GraphPass]] = {"match": lambda: MatchPass(lambda site: True), "roles": RolePass}
EVERY = pytest.mark.parametrize("name", PASSES)
BOTH = pytest.mark.parametrize("form", FORMS)


class Gated(nn.Module):
    """A feed-forward whose input has two users, and whose first weight is read by two products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[rows, 6]``."""
        y = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return y + self.gate(y).mean()


def marks(graph_module: GraphModule) -> dict[str, Any]:
    found = {n.name: (TARGET.get(n), ROLE.get(n)) for n in graph_module.graph.nodes}
    return {name: pair for name, pair in found.items() if pair != (None, None)}


@EVERY
@BOTH
def test_marks_nodes(name: str, form: str) -> None:
    graph_module = FORMS[form]()
    result = PASSES[name]()(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    assert result.report.nodes_after == result.report.nodes_before == len(graph_module.graph.nodes)
    targets = {TARGET.of(n).site for n in graph_module.graph.nodes if TARGET.has(n)}
    roles = {ROLE.of(n) for n in graph_module.graph.nodes if ROLE.has(n)}
    assert (targets, "embedding.token" in roles) == ((set(SITES), False) if name == "match" else (set(), True))


@EVERY
@BOTH
def test_unchanged(name: str, form: str) -> None:
    graph_module = FORMS[form]()
    PASSES[name]()(graph_module)
    before, text = marks(graph_module), snapshot(graph_module)
    again = PASSES[name]()(graph_module)
    assert not again.modified
    assert again.graph_module is graph_module
    assert marks(graph_module) == before
    assert snapshot(graph_module) == text
    bare = torch.fx.symbolic_trace(nn.ReLU())
    nothing = PASSES[name]()(bare)
    assert not nothing.modified
    assert nothing.graph_module is bare
    assert not marks(bare)


@EVERY
@BOTH
def test_numerics(name: str, form: str) -> None:
    """To the bit, and the code is the same."""
    graph_module = FORMS[form]()
    before, output = snapshot(graph_module), graph_module(IDS)
    assert Pipeline([PASSES[name]()])(graph_module) is graph_module
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), output)


@pytest.mark.parametrize("decompose", [None, False, True])
def test_several_users(decompose: bool | None) -> None:
    """Two nodes of one module are two targets of one site; one input may have several targets."""
    graph_module = torch.fx.symbolic_trace(Gated())
    if decompose is not None:
        program = torch.export.export(Gated(), (torch.randn(4, 6),))
        graph_module = (program.run_decompositions() if decompose else program).module()
    MatchPass(lambda site: True)(graph_module)
    sites = [TARGET.of(n).site for n in graph_module.graph.nodes if TARGET.has(n)]
    assert sorted(sites) == ["down", "gate", "gate", "up"]
    inputs = [n.args[TARGET.of(n).input] for n in graph_module.graph.nodes if TARGET.has(n)]
    assert sorted(inputs.count(one) for one in set(inputs)) == [1, 1, 2]


def test_chain() -> None:
    """Roles first, then a pattern that asks for them."""
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)))
    Pipeline([RolePass(), MatchPass(pattern("role:lm_head"))])(graph_module)
    assert [TARGET.of(n).site for n in graph_module.graph.nodes if TARGET.has(n)] == ["1"]
    assert {name: role for name, (_, role) in marks(graph_module).items()} == {"_0": "embedding.token", "_1": "lm_head"}
