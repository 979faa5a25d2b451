"""The graphs of slots with lanes and without: golden, by the forward's text and what Dynamo captures of it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fxpeft
from fxpeft.passes import forward_text
from fxpeft.passes.slots.lanes import Lanes, RowTensors, gathers

ONE_LANE = """\
def forward(self, input):
    input_1 = input
    weight = self.weight
    bias = self.bias
    slot = self.slot
    in_use = fxpeft_passes_slots_slot_in_use(slot);  slot = None
    getitem = in_use[0]
    getitem_1 = in_use[1]
    getitem_2 = in_use[2]
    getitem_3 = in_use[3];  in_use = None
    linear = torch._C._nn.linear(input_1, weight, bias);  weight = bias = None
    update = fxpeft_passes_targets_update_update(input_1, getitem, getitem_1, getitem_2, getitem_3)
    add = linear + update;  update = None
    type_as = add.type_as(linear);  add = linear = None
    return type_as
"""
LANES = """\
def forward(self, input):
    input_1 = input
    weight = self.weight
    bias = self.bias
    slot = self.slot
    gained = fxpeft_passes_slots_lanes_gained(slot, input_1);  input_1 = None
    linear = torch._C._nn.linear(gained, weight, bias);  weight = bias = None
    adapted = fxpeft_passes_slots_lanes_adapted(slot, gained, linear);  slot = gained = linear = None
    return adapted
"""
PLAIN = ["narrow", "narrow", "narrow", "linear", "linear", "mul", "eq", "where", "matmul", "add", "type_as"]
PACKED = [
    "linear", "narrow", "narrow", "narrow", "mul", "reshape", "view", "linear", "eq", "mul", "where", "matmul", "add",
    "type_as",
]  # fmt: skip
GATHERED = [
    "linear", "reshape", "reshape", "flatten", "index_select", "view", "index_select", "view", "index_select", "view",
    "mul", "unsqueeze", "reshape", "transpose", "bmm", "eq", "mul", "where", "bmm", "view", "add", "type_as",
]  # fmt: skip


class Net(nn.Module):
    """One projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.dummy_inputs = nn.Linear(6, 5), {"x": torch.zeros(2, 3, 6)}

    def forward(self, x: Any) -> Any:
        """Takes ``[rows, tokens, 6]``."""
        return self.up(x)


def prepared(lanes: int) -> Net:
    model = Net().eval()
    fxpeft.prepare_hotswap(model, 8, targets=["up"], lanes=lanes)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["up"]), "a")
    return model


def operations(model: nn.Module, tokens: int = 3) -> list[str]:
    """What Dynamo captures of a call, in its order, without what does nothing to plain floats on one device."""
    captured: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any) -> GraphModule:
        captured.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(4, tokens, 6))
    nodes = [n for graph in captured for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    names = [n.target if isinstance(n.target, str) else n.target.__name__ for n in nodes]
    asked = ("size", "getitem", "to")
    return [n for i, n in enumerate(names) if n not in asked and not (n == "type_as" and i + 1 < len(names))]


def test_one_lane_is_the_graph_of_before() -> None:
    model = prepared(1)
    text = forward_text(model.up)
    assert [line.partition(";  input_1")[0] for line in text.split("\n")] == ONE_LANE.split("\n")
    assert sorted(operations(model)) == sorted(PLAIN)
    assert [name for name, _ in model.named_buffers()] == ["up.slot.a", "up.slot.b", "up.slot.d"]


def test_packed_rows() -> None:
    model = prepared(3)
    assert forward_text(model.up) == LANES
    assert sorted(operations(model)) == sorted(PLAIN)  # a call without rows
    with fxpeft.rows(model, ["a", None, "a", {"a": 0.5}]):
        assert operations(model) == PACKED


def test_gathered_rows() -> None:
    """Over long inputs; how long says the number of adapters that a batch may have."""
    model = prepared(3)
    with fxpeft.rows(model, ["a", None, "a", {"a": 0.5}]):
        assert operations(model, tokens=16) == PACKED
        assert operations(model, tokens=17) == GATHERED
        x = torch.zeros(4, 17, 6)
        assert [gathers(model.up.slot, part) for part in (x, x[:, :5], x[:2], x[0])] == [True, False, False, False]


def test_lanes_are_a_threads_own() -> None:
    lanes = Lanes(3, 8)
    numbers = torch.zeros(2, 4, dtype=torch.long)
    lanes.name(RowTensors(torch.ones(2, 5), torch.ones(2, 3), numbers[:, 0], numbers, torch.ones(2, 4)), 1)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(lanes.named.mask.shape[0]))
    thread.start()
    thread.join()
    assert (seen, lanes.named.mask.shape[0]) == ([0], 2)
    for twin in (copy.deepcopy(lanes), pickle.loads(pickle.dumps(lanes))):
        assert (twin.count, twin.max_rank, twin.dynamic, twin.named.mask.shape[0]) == (3, 8, True, 0)
