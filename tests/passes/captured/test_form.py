"""The form of a slot's update in a captured graph: sums where the input is known to be one row, products elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

import fxpeft
from fxpeft.passes import FormPass, InjectPass, MatchPass, Pipeline
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.targets.operations import Linear
from fxpeft.passes.targets.update import update, update_row, update_rows


class Net(nn.Module):
    """Two linears in a chain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 6]`` to ``[..., 4]``."""
        return self.second(self.first(x).relu())


KINDS = {"first": Linear(6, 10), "second": Linear(10, 4)}
ROWS: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "one": ((1, 1, 6), None, update_row),
    "one, flat": ((6,), None, update_row),
    "several": ((2, 1, 6), None, update_rows),
    "as many as come": ((2, 3, 6), ({1: torch.export.Dim("tokens")},), update_rows),
}


def slots() -> dict[str, Slot]:
    made = {site: Slot(kind, 4, None) for site, kind in KINDS.items()}
    generator = torch.Generator().manual_seed(2)
    for slot in made.values():
        for buffer in slot.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return made


@pytest.mark.parametrize("rows", ROWS)
def test_the_form_follows_the_rows(rows: str) -> None:
    shape, dynamic, expected = ROWS[rows]
    net, x = Net().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gm = torch.export.export(net, (x,), dynamic_shapes=dynamic).module()
    held = slots()
    passes = [MatchPass(lambda site: True), InjectPass({site: [slot.rewrite()] for site, slot in held.items()})]
    Pipeline(passes)(gm)
    assert sum(n.target is update for n in gm.graph.nodes) == 2
    wanted, form = gm(x), FormPass()
    pipeline = Pipeline([form])
    pipeline(gm)
    assert [n.target for n in gm.graph.nodes if n.target in (update, update_row, update_rows)] == [expected] * 2
    assert [entry.partition(": ")[2] for entry in pipeline.reports[0].matched] == [expected.__name__] * 2
    assert_close(gm(x), wanted)
    with torch.no_grad():
        assert float((wanted - net(x)).abs().max()) > 0.1
    again = form(gm)
    assert not again.modified
    assert again.graph_module is gm


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_program_with_slots(tokens: int) -> None:
    """The form reaches the operators of the program, which computes what the live model does."""
    x, net = torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(1)), Net().eval()
    program = fxpeft.rewrite(torch.export.export(net, (x,)), fxpeft.Slots(["first", "second"], max_rank=4))
    called = [str(n.target) for n in program.graph.nodes]
    assert called.count("aten.sum.dim_IntList") == (4 if tokens == 1 else 0)
    assert called.count("aten.matmul.default") == (0 if tokens == 1 else 2)
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


def test_a_graph_without_values_multiplies() -> None:
    gm = torch.fx.symbolic_trace(Net().eval())
    Pipeline([MatchPass(lambda site: True), InjectPass({s: [slot.rewrite()] for s, slot in slots().items()})])(gm)
    Pipeline([FormPass()])(gm)
    assert [n.target for n in gm.graph.nodes if n.target in (update, update_row, update_rows)] == [update_rows] * 2
