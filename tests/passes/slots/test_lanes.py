"""The graphs of slots with lanes and without: golden, by the forward's text and what Dynamo captures of it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from adapter_files import add
from torch import nn
from torch.fx import GraphModule

import fxpeft
from fxpeft.passes import forward_text
from fxpeft.passes.slots.lanes import Lanes, RowTensors, form_of, gathered, packed, summed

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
    "linear", "reshape", "flatten", "reshape", "flatten", "flatten", "index_select", "view", "index_select", "view",
    "index_select", "view", "mul", "unsqueeze", "reshape", "transpose", "bmm", "eq", "mul", "where", "bmm", "view",
    "add", "type_as",
]  # fmt: skip
SUMMED = [
    "linear", "reshape", "reshape", "mul", "reshape", "mul", "sum", "eq", "mul", "where", "arange", "mul", "flatten",
    "flatten", "embedding_bag", "view", "add", "type_as",
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


def operations(model: nn.Module, tokens: int = 1, grad: bool = False) -> list[str]:
    """What Dynamo captures of a call, in its order, without what does nothing to plain floats on one device."""
    captured: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any) -> GraphModule:
        captured.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
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
    """Of more tokens, or of more adapters."""
    model = prepared(3)
    with fxpeft.rows(model, ["a", None, "a", {"a": 0.5}]):
        assert operations(model, tokens=16) == PACKED
        assert operations(model, tokens=17) == GATHERED
    slot = model.up.slot
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["up"]), "b")
    with fxpeft.rows(model, ["a", "b", None, "a"]):  # five ranks, of which a row has three
        assert [form_of(slot, torch.zeros(4, tokens, 6)) for tokens in (3, 4)] == [packed, gathered]
        assert form_of(slot, torch.zeros(4, 4, 6, device="meta")) is packed  # a guess, as for GPUs
    with fxpeft.rows(model, ["b", "b"]):
        assert form_of(slot, torch.zeros(2, 512, 6)) is packed


def test_summed_rows() -> None:
    """Of one token, where the call is compiled for a CPU."""
    model = prepared(4)
    with fxpeft.rows(model, ["a", None, "a", {"a": 0.5}]):
        assert operations(model) == SUMMED
        assert "embedding_bag" not in operations(model, grad=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_forms_are_equal(dtype: torch.dtype, error: float) -> None:
    """Compiled by Inductor, of rows that have an adapter, half of one, two, and none."""
    model = Net().to(dtype).eval()
    for rank, name in ((3, "a"), (2, "b")):
        add(model, fxpeft.LoraConfig(r=rank, lora_alpha=5, target_modules=["up"]), name, seed=rank)
    fxpeft.prepare_hotswap(model, 8, targets=["up"], lanes=4)
    slot, x = model.up.slot, torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad(), fxpeft.rows(model, ["b", {"a": 0.5}, {"a": 1, "b": -2}, None]):
        wanted = packed(slot, x)
        for form in (packed, gathered, summed):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(form)(slot, x), wanted, rtol=error, atol=error)
    assert (wanted[:3].abs().amax(-1) > 0.1).all()
    assert not wanted[3].any()


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
