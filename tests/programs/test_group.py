"""Group: sites with one input share one product, and what it reads is always what the slots hold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import fxpeft
from fxpeft import IA3Config, LoraConfig
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.slots.stack import Stack
from fxpeft.programs.backend import DEFAULT, PASSES, backend
from fxpeft.testing import no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
MAX_RANK = 8
TARGETS = ["q", "k", "v", "o", "gate", "up"]
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """q, k and v read one input, gate and up another, o its own; no two of them have one shape but k and v.

    Args:
        kind: ``"break"``: a graph break between q and k; ``"write"``: their input is written there;
            ``"reuse"``: k is called again on another input, and q on the same one.
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.Linear(8, 6)
        self.gate, self.up = nn.Linear(6, 9), nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, length, 6]``."""
        h = torch.tanh(x)
        q = self.q(h)
        if self.kind == "break":
            torch._dynamo.graph_break()
        if self.kind == "write":
            h.mul_(0.5)
        k, v = self.k(h), self.v(h)
        if self.kind == "reuse":
            q, k = q + torch.tanh(self.q(h)), k + self.k(x)
        x = x + self.o(q * torch.sigmoid(torch.cat([k, v], -1)))
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


class Net(nn.Sequential):
    """With a forward of its own: hooks on torch's Sequential are traced away, and the swap lock with them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Checkpointed(Net):
    """Each layer in a checkpoint: a higher-order operator."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


ADAPTERS: dict[str, Any] = {
    "full": LoraConfig(r=MAX_RANK, lora_alpha=5, target_modules=TARGETS),
    "two": LoraConfig(r=2, lora_alpha=7, target_modules=TARGETS, alpha_pattern={"k": 3}),
    "some": LoraConfig(r=5, lora_alpha=4, target_modules=["k", "gate", "o"], rank_pattern={"k": 3}),
    "one": LoraConfig(r=1, lora_alpha=3, target_modules=["v"]),
    "first": LoraConfig(r=4, lora_alpha=3, target_modules=["0.q", "0.up"]),
}


def prepared(kind: str = "", layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net(*(Block(kind) for _ in range(layers))).eval()
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=TARGETS, **options)
    fxpeft.set_adapter(model, "full")
    return model


def walk(model: nn.Module, compiled: Callable[[Tensor], Tensor]) -> None:
    """Through all adapters, up and down in rank, on and off; no two of them give the same."""
    with torch.no_grad():
        bare, seen = _off(model), list[Tensor]()
        for name in [*ADAPTERS, *reversed(ADAPTERS), "off", "two"]:
            fxpeft.disable_adapters(model) if name == "off" else fxpeft.enable_adapters(model)
            if name != "off":
                fxpeft.set_adapter(model, name)
            wanted = model(X)
            assert_close(compiled(X), wanted)
            assert name == "off" or (wanted - bare).abs().max() > 0.01
            assert not seen or name == "first" or not torch.allclose(seen[-1], wanted, rtol=0, atol=0.01)
            seen.append(wanted)


def _off(model: nn.Module) -> Tensor:
    fxpeft.disable_adapters(model)
    output: Tensor = model(X)
    fxpeft.enable_adapters(model)
    return output


def grouped(model: nn.Module, *, passes: Collection[str] = PASSES, **options: Any) -> Any:
    """``fxpeft.compile`` with every pass on."""
    return fxpeft.compile(model, passes=passes, **options)


class Recorder:
    """An inner backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Any, **more: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def count(self, *targets: Any) -> list[int]:
        """How many calls of these each graph has."""
        return [sum(n.target in targets for n in g.graph.nodes) for g in self.graphs]


def slots_of(model: nn.Module) -> list[Slot]:
    return [m for m in model.modules() if isinstance(m, Slot)]


def stacks_of(model: nn.Module) -> list[Stack]:
    return [stack for slot in slots_of(model) for stack in slot.stacks]


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the group pass reported since the last question."""
    caplog.set_level(logging.DEBUG, "fxpeft.passes.pipeline")

    def read() -> list[str]:
        found = [m for m in caplog.messages if m.startswith("group:")]
        caplog.clear()
        return found

    return read


# --- what is grouped ---


@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_one_product_per_input(rank: str, reports: Callable[[], list[str]]) -> None:
    model, recorder, plain = prepared(rank=rank), Recorder(), Recorder()
    compiled = grouped(model, inner=recorder, passes=("group", "clean"), fullgraph=True)
    with no_recompiles() as counted:
        walk(model, compiled)
    assert counted.graphs == 1
    with torch.no_grad():
        grouped(model, inner=plain, passes=(), fullgraph=True)(X)
    linear = torch.nn.functional.linear
    assert plain.count(linear) == [2 * (7 + 6)]  # each layer's own, and an A for each of its sites
    assert recorder.count(linear) == [2 * (7 + 3)]
    (report,) = reports()
    assert report.startswith("group: 10 matched, 2 skipped")
    assert [line.strip() for line in report.splitlines()[1:]] == [
        f"skipped {n}.o: shares its input with no other site" for n in (0, 1)
    ]
    shapes = {tuple(s.tensor.shape) for s in stacks_of(model)}
    assert shapes == {(MAX_RANK, 3, 6), (MAX_RANK, 2, 6)}
    assert len(stacks_of(model)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=["", "dynamic shapes"])
def test_no_rank_recompiles_through_inductor(options: dict[str, Any]) -> None:
    """The rank of the stack, its largest one and a length that equals a rank among them."""
    model = prepared(layers=1)
    compiled = grouped(model, fullgraph=True, **options)
    with no_recompiles():
        walk(model, compiled)
    assert len(stacks_of(model)) == 2


def test_layers_that_share_code_have_stacks_of_their_own() -> None:
    model, recorder = prepared(layers=3), Recorder()
    for layer in model:
        layer.compile(backend=backend, options={"inner": recorder, "passes": PASSES}, fullgraph=True)
    wanted = prepared(layers=3)
    with no_recompiles() as counted, torch.no_grad():
        for name in (*ADAPTERS, *reversed(ADAPTERS)):
            fxpeft.set_adapter(model, name)
            fxpeft.set_adapter(wanted, name)
            assert_close(model(X), wanted(X))
    assert counted.graphs == 1
    assert len(stacks_of(model)) == 6
    assert len({s.tensor.data_ptr() for s in stacks_of(model)}) == 6


def test_a_graph_break_parts_a_group(reports: Callable[[], list[str]]) -> None:
    model = prepared("break", layers=1)
    walk(model, grouped(model, inner="eager"))
    found = reports()
    assert [r.partition(",")[0] for r in found] == ["group: 0 matched", "group: 4 matched"]  # k and v, gate and up
    assert found[0].splitlines()[1].strip() == "skipped q: shares its input with no other site"


def test_a_module_called_twice(reports: Callable[[], list[str]]) -> None:
    model, recorder = prepared("reuse", layers=1), Recorder()
    compiled = grouped(model, inner=recorder, passes=("group", "clean"), fullgraph=True)
    with no_recompiles():
        walk(model, compiled)
    # q twice on h, with k and v: one product; k once more, on x
    assert recorder.count(torch.nn.functional.linear) == [7 + 2 + (1 + 1 + 1 + 1)]
    assert reports()[0].startswith("group: 5 matched, 1 skipped")


def test_an_input_that_is_written_in_between_is_not_shared(reports: Callable[[], list[str]]) -> None:
    model = prepared("write", layers=1)
    walk(model, grouped(model, inner="eager", fullgraph=True))
    (report,) = reports()
    assert report.startswith("group: 2 matched, 4 skipped")
    assert report.count("mul_ may change their input between the sites that share it") == 3


@pytest.mark.parametrize(
    "passes",
    [(), ("clean",), ("group",), ("fold_inactive",), ("group", "clean"), ("fold_inactive", "group"), DEFAULT, PASSES],
    ids="+".join,
)
def test_passes_are_on_by_name(passes: tuple[str, ...]) -> None:
    model, recorder = prepared(), Recorder()
    compiled = grouped(model, inner=recorder, passes=passes, fullgraph=True)
    with no_recompiles() as counted:
        walk(model, compiled)
    assert counted.graphs == 1
    assert len(recorder.graphs) == (2 if "fold_inactive" in passes else 1)
    assert len(stacks_of(model)) == (4 if "group" in passes else 0)
    dead = [sum(n.op.startswith("call") and not n.users for n in g.graph.nodes) for g in recorder.graphs]
    left = [True] * ("fold_inactive" in passes) + ["group" in passes]  # what these leave, clean takes away
    assert [count > 0 for count in dead] == ([False] * len(left) if "clean" in passes else left)
    if passes == DEFAULT:
        recorder.graphs.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            fxpeft.compile(model, inner=recorder)(X)
        assert len(recorder.graphs) == 2


def test_a_checkpoint_is_left_alone(reports: Callable[[], list[str]]) -> None:
    model = prepared()
    model.__class__ = Checkpointed
    walk(model, grouped(model, inner="eager", fullgraph=True))
    (report,) = reports()
    assert report.startswith("group: 0 matched, 12 skipped")
    assert report.count("is read in the body of a higher-order operator") == 12


class Others(nn.Module):
    """Two convolutions of one input and two linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 5, 1), nn.Conv1d(6, 3, 1)
        self.c, self.d = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 6, 5]``."""
        return self.c(self.a(x)) @ self.c(x[:, :5]).transpose(1, 2) + self.b(x).sum() + self.d(self.a(x)).sum()


def test_what_is_left_alone_says_why(reports: Callable[[], list[str]]) -> None:
    x = X.transpose(1, 2).contiguous()
    torch.manual_seed(0)
    bare = Others().eval()
    for change, reason in (
        (
            lambda m: None,
            {"a": "is no linear site with more rows than one", "b": "is no linear site with more rows than one"},
        ),
        (lambda m: m.c.slot.a.requires_grad_(), {"c": "its A is trained"}),
    ):
        torch._dynamo.reset()
        model = copy.deepcopy(bare)
        fxpeft.prepare_hotswap(model, 4, targets=["a", "b", "c", "d"])
        change(model)
        with torch.no_grad():
            torch.testing.assert_close(grouped(model, inner="eager", passes=("group",))(x), bare(x))
        (report,) = reports()
        assert all(f"skipped {site}: {why}" in report for site, why in reason.items()), report


def test_a_gain_on_the_input_makes_inputs_differ(reports: Callable[[], list[str]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block()).eval()
    fxpeft.add_adapter(model, IA3Config(target_modules=["q", "k"], feedforward_modules=["k"]), "gains")
    randomise(fxpeft.adapter_state_dict(model, "gains").values())
    fxpeft.prepare_hotswap(model, 4, targets=TARGETS, methods=("lora", "ia3"))
    with torch.no_grad():
        found = grouped(model, inner="eager")(X)
        assert_close(found, model(X))
    (report,) = reports()
    assert report.startswith("group: 0 matched, 6 skipped")
    assert report.count("multiplies its input by a gain of its own") == 6
    assert not stacks_of(model)


def test_dora_is_grouped_and_half_precision_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(Block()).to(dtype).eval()
        fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True))
        own = fxpeft.adapter_state_dict(model).items()
        randomise((v for k, v in own if "magnitude" not in k), scale=0.2)
        fxpeft.prepare_hotswap(model, 4, targets=TARGETS, methods=("lora", "dora"))
        with torch.no_grad():
            found = grouped(model, inner="aot_eager")(X.to(dtype))
            assert_close(found, model(X.to(dtype)))
        assert [s.tensor.dtype for s in stacks_of(model)] == [slots_of(model)[0].a.dtype] * 2


def test_gradients_of_the_input() -> None:
    model = prepared(layers=1).requires_grad_(False)
    found = []
    for call in (model, grouped(model, inner="aot_eager", passes=("group", "clean"))):
        x = X.clone().requires_grad_()
        call(x).square().sum().backward()
        found.append(x.grad)
    assert len(stacks_of(model)) == 2
    assert_close(*found)
