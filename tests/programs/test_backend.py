"""The backend: a graph without slots runs where they hold nothing, and nothing recompiles on the way."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import Layer, randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import fxpeft
from fxpeft import AdapterError, IA3Config, LoraConfig
from fxpeft.passes.slots.slot import Slot, slot_of
from fxpeft.programs.backend import PASSES
from fxpeft.testing import no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two layers, a module used twice, on request a graph break or checkpoints."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.shared, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.kind == "checkpoint" else layer(x)
            if self.kind == "break":
                torch._dynamo.graph_break()
        return self.out(self.shared(torch.relu(self.shared(x))))


def net(kind: str = "") -> Net:
    torch.manual_seed(0)
    return Net(kind).eval()


TARGETS = ["up", "down", "shared"]
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"up": 4})
CONV: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))  # noqa: E731


class Recorder:
    """An inner backend that runs graphs as they are and counts which ones ran."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.ran: list[int] = []

    def __call__(self, gm: GraphModule, inputs: Any, **more: Any) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append(gm)

        def run(*args: Any) -> Any:
            self.ran.append(number)
            return gm.forward(*args)

        return run

    def last(self) -> list[int]:
        """The graphs that ran since the last question."""
        ran, self.ran = self.ran, []
        return ran


def adapter(model: nn.Module, config: Any, name: str, seed: int = 0) -> None:
    fxpeft.add_adapter(model, config, name)
    for key, value in fxpeft.adapter_state_dict(model, name).items():
        randomise([value], seed)
        if "ia3" in key:
            value.data.add_(1)
    fxpeft.set_scale(model, name, 1.0) if isinstance(config, LoraConfig) else None
    fxpeft.set_adapter(model, name)


def prepared(kind: str = "", **options: Any) -> Net:
    """A model with slots and two adapters; ``off`` reaches one layer only."""
    model = net(kind)
    adapter(model, LORA, "a")
    adapter(model, LoraConfig(r=2, target_modules=["layers.1.down"]), "part", seed=1)
    adapter(model, IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]), "gains", seed=2)
    adapter(model, fxpeft.OFTConfig(oft_block_size=3, target_modules=["up"]), "turned", seed=3)
    adapter(model, fxpeft.LoKrConfig(r=2, target_modules=["up", "shared"]), "product", seed=4)
    fxpeft.prepare_hotswap(model, 8, targets=TARGETS, methods=("lora", "lora_bias", "ia3", "oft", "lokr"), **options)
    return model


def eager(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x)
    return output


@pytest.mark.parametrize("rank", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["", "checkpoint", "break"])
def test_idle_slots_run_a_graph_without_them(kind: str, rank: Any) -> None:
    model, bare, recorder = prepared(kind, rank=rank), eager(net()), Recorder()
    compiled = fxpeft.compile(model, inner=recorder)
    with no_recompiles(), torch.no_grad():
        for name in ("a", "off", "gains", "part", "off", "turned", "product", "a"):
            fxpeft.disable_adapters(model) if name == "off" else fxpeft.enable_adapters(model)
            if name != "off":
                fxpeft.set_adapter(model, name)
            output = compiled(X)
            ran = recorder.last()
            assert_close(output, eager(model), terms=1, size=1.0)
            if name == "off":
                assert torch.equal(output, bare)
                assert all(_slots_read(recorder.graphs[n]) == 0 for n in ran)
            else:
                assert (output - bare).abs().max() > 0.01
                assert any(_slots_read(recorder.graphs[n]) > 0 for n in ran)


def _slots_read(gm: GraphModule) -> int:
    """Slot tensors that somebody reads, in bodies too; a fold that did nothing would leave them."""
    own = sum(bool(n.users) and "slot" in n.name for n in gm.graph.nodes if n.op == "placeholder")
    bodies = [m for name, m in gm.named_modules() if name and isinstance(m, GraphModule)]
    if not bodies:
        return own
    return sum(len(n.users) > 0 and "slot" in n.name for m in bodies for n in m.graph.nodes if n.op == "placeholder")


def test_layers_compiled_once_choose_each_for_itself() -> None:
    model, recorder = prepared(), Recorder()
    for layer in model.layers:
        layer.forward = fxpeft.compile(layer.forward, inner=recorder)
    with no_recompiles(), torch.no_grad():
        fxpeft.set_adapter(model, "a")
        model(X)
        assert recorder.last() == [1, 1]  # one pair of graphs: 0 without slots, 1 with them
        fxpeft.set_adapter(model, "part")
        wanted = eager_of("part")
        recorder.last()
        assert_close(model(X), wanted, terms=1, size=1.0)
        assert recorder.last() == [0, 1]  # the first layer has nothing of this adapter
        fxpeft.disable_adapters(model)
        model(X)
        assert recorder.last() == [0, 0]


def eager_of(name: str) -> Tensor:
    model = prepared()
    fxpeft.set_adapter(model, name)
    return eager(model)


@pytest.mark.slow
def test_through_inductor_as_a_named_backend() -> None:
    entry = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition("torch_dynamo_backends]\n")[2]
    module, function = entry.splitlines()[0].split('"')[1].split(":")
    backend = getattr(import_module(module), function)
    model, bare = prepared(), eager(net())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with no_recompiles() as counted, torch.no_grad():
        for name in ("a", "off", "part", "a", "gains", "off"):
            fxpeft.disable_adapters(model) if name == "off" else fxpeft.enable_adapters(model)
            if name != "off":
                fxpeft.set_adapter(model, name)
            assert_close(compiled(X), bare if name == "off" else eager(model))
    assert counted.graphs == 1


def test_convolutions_and_half_precision_fold() -> None:
    for make, x in ((CONV, torch.randn(2, 2, 8, 8)), (lambda: net().bfloat16(), X.bfloat16())):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model: Any = make().eval()  # type: ignore[no-untyped-call]
        wanted, recorder = eager(model, x), Recorder()
        targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        fxpeft.prepare_hotswap(model, 4, targets=targets, methods=("lora", "dora", "ia3"))
        compiled = fxpeft.compile(model, inner=recorder)
        assert torch.equal(eager(compiled, x), wanted)
        assert [_slots_read(g) == 0 for g in recorder.graphs] == [True, False]
        assert recorder.last() == [0]


def test_golden_graph(tmp_path: Path) -> None:
    """The dumps: with the slot before; after, one linear."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    fxpeft.prepare_hotswap(model, 4, targets=["0"], rank="static")
    eager(fxpeft.compile(model, inner="eager", dump=tmp_path, passes=PASSES), X[:, :4])
    names = {p.name: sorted(f.name for f in p.iterdir()) for p in tmp_path.iterdir()}
    assert names == {
        f"graph-01-{way}": [f"{n}-{w}.py" for n in passes for w in ("after", "before")]
        for way, passes in (("idle", ("01-fold_inactive", "02-clean")), ("active", ("01-group", "02-clean")))
    }
    idle = tmp_path / "graph-01-idle"
    before, after = ((idle / name).read_text() for name in ("01-fold_inactive-before.py", "02-clean-after.py"))
    assert before.count("linear(") == 2
    assert before.count("matmul(") == 1
    assert re.sub(r"L_\w+ : [\w.]+", "_", after).partition("\n")[0] == "def forward(self, _, _, _, _, _, _):"
    assert [re.sub(r"l_[a-z]+_", "_", line.partition(";")[0]).strip() for line in after.splitlines()[7:]] == [
        "linear = torch._C._nn.linear(_0_, _modules_0_parameters_weight_, _modules_0_parameters_bias_)",
        "return (linear,)",
    ]


def test_passes_are_off_by_name_and_unknown_ones_are_refused() -> None:
    model, recorder = prepared(), Recorder()
    with torch.no_grad():
        fxpeft.compile(model, inner=recorder, passes=())(X)
    assert len(recorder.graphs) == 1
    with pytest.raises(AdapterError, match="passes: expected some of fold_inactive, group, clean, found"):
        fxpeft.compile(model, passes=("fold", "fold_inactive"))


def test_a_model_without_slots_is_compiled_once() -> None:
    recorder = Recorder()
    with torch.no_grad():
        output = fxpeft.compile(net(), inner=recorder)(X)
    assert len(recorder.graphs) == 1
    assert torch.equal(output, eager(net()))


def test_slots_are_found_by_their_tensors() -> None:
    model = prepared()
    slot = model.shared.slot
    assert isinstance(slot, Slot)
    assert slot_of(slot.d) is slot
    assert slot_of(slot.d.clone()) is None
    twin = copy.deepcopy(model)
    assert slot_of(twin.shared.slot.d) is twin.shared.slot
    old = slot.a
    model.to(torch.bfloat16)
    assert slot_of(old) is None
    assert slot_of(slot.a) is slot
    address = id(twin.shared.slot.d)
    del twin
    gc.collect()
    from fxpeft.passes.slots.slot import _slots

    assert address not in _slots


# --- training ---


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    call(X).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_through_the_backend(inner: str) -> None:
    model = net("checkpoint" if inner == "aot_eager" else "")
    adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True), "a")
    wanted = gradients(model, model)
    assert len(wanted) == 3 * 5
    assert all(g.abs().max() > 0 for g in wanted.values())
    found = gradients(model, fxpeft.compile(model, inner=inner))
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        assert_close(found[name], grad)


@pytest.mark.parametrize(
    "config", [LORA, LoraConfig(r=2, target_modules=["down"], use_dora=True)], ids=["lora", "dora"]
)
def test_gradients_through_a_rewritten_program(config: Any) -> None:
    live = net()
    adapter(live, config, "default")
    tensors = {k: v.detach().clone() for k, v in fxpeft.adapter_state_dict(live).items()}
    wanted = gradients(live, live)
    program = torch.export.export(net(), (X,))
    for each in (program, torch.fx.symbolic_trace(net())):
        rewritten: Any = fxpeft.rewrite(each, config, state_dict=tensors)  # type: ignore[type-var]
        module = rewritten.module() if each is program else rewritten
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("adapters."))
        found = gradients(module, module)
        if each is program:
            torch._dynamo.reset()
            compiled = torch.compile(module, backend="aot_eager")
            again = gradients(module, compiled)
            assert set(again) == set(found)
            for name, grad in found.items():
                assert_close(again[name], grad)
        renamed = {n.removeprefix("adapters.").replace(".default.", ".adapters.default."): g for n, g in found.items()}
        assert set(renamed) == set(wanted)
        for name, grad in wanted.items():
            assert_close(renamed[name], grad)


def test_a_program_trains_and_dropout_takes_part() -> None:
    config = LoraConfig(r=3, target_modules=["up", "out"], lora_dropout=0.5)
    program = torch.export.export(net(), (X,))
    module: Any = fxpeft.rewrite(program, config, training=True).module()
    randomise(p for n, p in module.named_parameters() if "lora_" in n)
    assert not torch.equal(eager(module), eager(module))
    still: Any = fxpeft.rewrite(program, config).module()
    assert torch.equal(eager(still), eager(still))
    own = [p for n, p in module.named_parameters() if n.startswith("adapters.")]
    optimiser = torch.optim.Adam(own, lr=0.05)
    losses = []
    for _ in range(40):
        loss = (module(X) - 1).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_rewrite_inside_a_backend_of_ones_own(inner: str) -> None:
    """Dynamo's graph takes parameters as inputs; what the backend adds is a parameter that AOTAutograd finds."""
    live = net()
    adapter(live, LORA, "default")
    tensors = {k: v.detach().clone() for k, v in fxpeft.adapter_state_dict(live).items()}
    wanted = gradients(live, live)
    held: dict[str, nn.Parameter] = {}

    def mine(gm: GraphModule, inputs: Any) -> Any:
        rewritten = fxpeft.rewrite(gm, LORA, state_dict=tensors)
        held.update(rewritten.named_parameters())
        return torch._dynamo.lookup_backend(inner)(rewritten, inputs)

    model = net().requires_grad_(False)
    compiled = torch.compile(model, backend=mine, fullgraph=True)
    assert_close(compiled(X), live(X))
    compiled(X).square().sum().backward()
    found = {n.removeprefix("adapters.").replace(".default.", ".adapters.default."): p.grad for n, p in held.items()}
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        assert_close(found[name], grad)
    with torch.no_grad():  # a swap is a copy in place
        held["adapters.shared.default.lora_B"].zero_()
    fxpeft.adapter_state_dict(live)["base_model.model.shared.lora_B.weight"].data.zero_()
    assert_close(compiled(X), live(X))


class Remembers(nn.Module):
    """Writes what it computed into a buffer, as a static cache does, and reads it back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.seen[0] = h
        self.seen.index_add_(0, torch.tensor([1]), h.unsqueeze(0))
        found: Tensor = self.down(self.seen.sum(0))
        return found


@pytest.mark.parametrize("active", [True, False], ids=["on", "off"])
def test_what_a_model_writes_stays_in_its_graphs(active: bool) -> None:
    torch.manual_seed(0)
    model = Remembers().eval()
    adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]), "a")
    fxpeft.prepare_hotswap(model, 4)
    if not active:
        fxpeft.disable_adapters(model)
    wanted = [eager(model), eager(model)]
    state = model.seen.clone()
    model.seen.zero_()
    compiled = fxpeft.compile(model, inner=Recorder(), passes=PASSES, fullgraph=True)
    for each in wanted:
        assert_close(eager(compiled), each, terms=1, size=1.0)
    assert_close(model.seen, state, terms=1, size=1.0)
    assert state[1].abs().max() > 0.1
