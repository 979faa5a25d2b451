"""Rewritten programs compute what the live model with the same adapter computes; eject gives the program back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_files import add
from closeness import assert_close
from tiny import randomise, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fxpeft
from fxpeft import AdaLoraConfig, AdapterError, IA3Config, LoraConfig, PromptTuningConfig, Slots
from fxpeft.programs import adapter_inputs, eject, rewrite
from fxpeft.targets.sites import make_plan

X = torch.randn(3, 4, 12, 9, generator=torch.Generator().manual_seed(2))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Conv2d, a grouped one, linears in a chain, a shared one called twice, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding="same")
        self.words = nn.Embedding(11, 8)
        self.block = nn.ModuleDict({"up": nn.Linear(8, 10), "shared": nn.Linear(10, 10, bias=False)})
        self.down = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 4, 12, 9]``; the look-up's ids are made of the convolution's signs."""
        h = self.grouped(self.conv(x).relu())  # [batch, 4, 6, 8]
        h = h + self.words((h > 0).sum(-1)).mean(-1, keepdim=True)
        h = self.block["shared"](torch.tanh(self.block["shared"](self.block["up"](h))))
        return self.down(h) + h.mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


ALL = ["conv", "grouped", "words", "up", "shared", "down"]
DENSE = ["conv", "up", "shared", "down"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"down": 3}, alpha_pattern={"shared": 9}
    ),
    "lora_bias": lambda: LoraConfig(r=2, lora_alpha=6, target_modules=DENSE, lora_bias=True),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=[*DENSE, "words"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=DENSE, feedforward_modules=["down"]),
    "adalora": lambda: AdaLoraConfig(init_r=3, lora_alpha=5, target_modules=DENSE, total_step=9),
}


def adapted(method: str, model: nn.Module | None = None) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """The live model with a random adapter, its config, its tensors."""
    live = net() if model is None else model
    config = CONFIGS[method]()
    return live, config, add(live, config)


def dynamic() -> ExportedProgram:
    return export(net(), (X,), dynamic_shapes=({0: Dim("b")},))


PROGRAMS: dict[str, Callable[[], Any]] = {
    "training IR": lambda: export(net(), (X,)),
    "inference IR": lambda: export(net(), (X,)).run_decompositions(),
    "dynamic shapes": dynamic,
    "dynamic, inference": lambda: dynamic().run_decompositions(),
    "strict": lambda: export(net(), (X,), strict=True),
    "module()": lambda: export(net(), (X,)).module(),
    "symbolic_trace": lambda: torch.fx.symbolic_trace(net()),
    "dynamo": lambda: torch._dynamo.export(net())(X).graph_module,
}


@functools.cache
def captured_as(form: str) -> Any:
    """A program; no test changes it, since a rewrite makes another one."""
    return PROGRAMS[form]()


def call(program: Any, *args: Any, **kwargs: Any) -> Tensor:
    output: Any = (program.module() if isinstance(program, ExportedProgram) else program)(*args, **kwargs)
    return output[0] if isinstance(output, list | tuple) else output


def text(program: Any) -> tuple[str, ...]:
    """Everything that has to come back."""
    if isinstance(program, ExportedProgram):
        call_graph = str(program.module_call_graph[0].signature)
        held = f"{list(program.state_dict)} {list(program.constants)} {program.range_constraints}"
        bodies = [n.code for n in program.graph_module.modules() if isinstance(n, torch.fx.GraphModule)]
        return str(program.graph), str(program.graph_signature), call_graph, held, *bodies
    bodies = [m.code for m in program.modules() if isinstance(m, torch.fx.GraphModule)]
    return str(program.graph), str(list(program.state_dict())), str([n for n, _ in program.named_modules()]), *bodies


FEWER = ("inference IR", "dynamic shapes", "symbolic_trace", "dynamo")  # forms in which every method is tried


@pytest.mark.parametrize(("method", "form"), [(m, f) for m in CONFIGS for f in PROGRAMS if m == "lora" or f in FEWER])
def test_equals_the_live_model(method: str, form: str) -> None:
    live, config, tensors = adapted(method)
    program = captured_as(form)
    before = text(program)
    rewritten = rewrite(program, config, state_dict=tensors)
    wanted = live(X)
    assert (wanted - net()(X)).abs().max() > 0.05
    assert_close(call(rewritten, X), wanted)
    assert type(rewritten) is type(program) or isinstance(rewritten, torch.fx.GraphModule)
    if "dynamic" in form:
        wider = torch.cat([X, X * 0.5])
        assert_close(call(rewritten, wider), live(wider))
    assert rewrite(rewritten, config) is rewritten
    assert text(program) == before
    ejected = eject(rewritten)
    assert text(ejected) == before
    assert torch.equal(call(ejected, X), call(program, X))


@pytest.mark.parametrize("form", ["training IR", "dynamic, inference", "symbolic_trace"])
@pytest.mark.parametrize("method", ["lora", "dora", "lora_bias"])
def test_adapters_as_inputs(form: str, method: str) -> None:
    live, config, tensors = adapted(method)
    program = captured_as(form)
    before = text(program)
    rewritten = rewrite(program, config, state_dict=tensors, adapters="inputs")
    first = adapter_inputs(rewritten)
    assert_close(call(rewritten, X, adapters=first), live(X))
    randomise(tensors.values(), seed=7)
    other = {k: v.clone() for k, v in first.items()}
    for key, value in other.items():
        if "scaling" not in key:
            site, _, name = key.replace(".default.", " ").partition(" ")
            found = [t for k, t in tensors.items() if k.startswith(f"base_model.model.{site}.") and name in rename(k)]
            value.data.copy_(found[0])
    assert_close(call(rewritten, X, adapters=other), live(X))
    assert not isinstance(rewritten, ExportedProgram) or set(rewritten.state_dict) == set(program.state_dict)
    assert text(eject(rewritten)) == before
    with pytest.raises(AdapterError, match="already"):
        rewrite(rewritten, config, name="more", adapters="inputs")


@pytest.mark.parametrize("form", ["training IR", "dynamic, inference", "dynamo", "symbolic_trace"])
def test_an_adapter_brings_its_biases(form: str) -> None:
    live = net()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["up", "conv"], bias="lora_only")
    fxpeft.add_adapter(live, config)
    tensors = fxpeft.adapter_state_dict(live)
    randomise(tensors.values())
    program = captured_as(form)
    if form == "symbolic_trace":  # a called module reads its bias itself
        with pytest.raises(AdapterError, match=r"(?s)an adapter can't bring its own:.*conv.bias"):
            rewrite(program, config, state_dict=tensors)
        return
    rewritten = rewrite(program, config, state_dict=tensors)
    assert_close(call(rewritten, X), live(X))
    assert text(eject(rewritten)) == text(program)


def rename(key: str) -> str:
    """PEFT's key in fxpeft's names."""
    key = key.replace("lora_embedding_", "lora_").replace("lora_B.bias", "lora_B_bias").replace("base_layer.", "")
    return f"{key.removesuffix('.weight')} {key.rpartition('.')[2] if key.endswith('bias') else ''}"


def test_tied_weights_and_conv1d() -> None:
    """GPT-2's head is tied to its embedding; adapting one leaves the other alone."""
    ids = token_ids()
    for targets in (["c_attn", "mlp.c_proj", "wte"], ["c_fc", "lm_head"]):
        live = tiny_gpt2()
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
        fxpeft.add_adapter(live, config)
        tensors = fxpeft.adapter_state_dict(live)
        randomise(tensors.values())
        program = export(tiny_gpt2(), (), {"input_ids": ids, "use_cache": False}, strict=False)
        rewritten = rewrite(program, config, state_dict=tensors)
        output = rewritten.module()(input_ids=ids, use_cache=False).logits
        assert_close(output, live(ids).logits)


def test_a_whole_llama_from_a_folder(tmp_path: Path) -> None:
    ids = token_ids()
    live = tiny_llama()
    fxpeft.add_adapter(live, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    randomise(fxpeft.adapter_state_dict(live).values())
    fxpeft.save_adapter(live, tmp_path)
    program = export(tiny_llama(), (), {"input_ids": ids, "use_cache": False})
    rewritten = rewrite(program, tmp_path)
    output = rewritten.module()(input_ids=ids, use_cache=False).logits
    assert_close(output, live(ids).logits)
    assert not any(p.requires_grad for n, p in rewritten.module().named_parameters() if "adapters" in n)


def test_a_rewritten_program_is_saved_and_loaded(tmp_path: Path) -> None:
    live, config, tensors = adapted("dora")
    rewritten = rewrite(captured_as("dynamic shapes"), config, state_dict=tensors)
    torch.export.save(rewritten, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert_close(loaded.module()(X), live(X))
    # the file says nothing of targets; what was loaded is a program like any other, and can be rewritten
    plain = torch.export.load(save(tmp_path / "plain.pt2", captured_as("training IR")))
    again = rewrite(plain, config, state_dict=tensors)
    assert_close(again.module()(X), live(X))


def save(path: Path, program: ExportedProgram) -> Path:
    torch.export.save(program, path)
    return path


def test_a_fresh_adapter_changes_nothing_and_its_parameters_are_named() -> None:
    program = captured_as("training IR")
    rewritten = rewrite(program, CONFIGS["dora"](), name="mine")
    assert_close(call(rewritten, X), call(program, X))
    new = set(rewritten.state_dict) - set(program.state_dict)
    assert new == {
        f"adapters.{site}.mine.{name}"
        for site in ("conv", "words", "block.up", "block.shared", "down")
        for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    }
    assert rewritten.state_dict["down.weight"] is program.state_dict["down.weight"]


# --- slots ---


@pytest.mark.parametrize("form", ["training IR", "dynamic, inference", "symbolic_trace"])
def test_static_slots_serve_an_adapter_by_copies(form: str) -> None:
    live, config, _tensors = adapted("lora")
    program = captured_as(form)
    rewritten = rewrite(program, Slots(ALL, max_rank=6))
    assert_close(call(rewritten, X), call(program, X), terms=1, size=1.0)
    if isinstance(rewritten, ExportedProgram):
        held: Mapping[str, Any] = rewritten.constants
    else:
        held = dict(rewritten.named_buffers())
    runner = rewritten.module() if isinstance(rewritten, ExportedProgram) else rewritten
    from fxpeft.adapters.state import find_state
    from fxpeft.methods import method_of

    state = find_state(live)
    assert state is not None
    adapter = state.adapters["default"]
    for site, plan in adapter.plan.sites.items():
        values = method_of(config).lower(plan, adapter.current().sites[site], None)  # type: ignore[arg-type]
        for name in "abd":
            value = getattr(values, name)
            dict(runner.named_buffers())[f"slot.{site}.{name}"][: len(value)].copy_(value)
    assert {f"slot.{s}.{n}" for s in adapter.plan.sites for n in "abd"} <= set(held)
    assert_close(runner(X), live(X))
    assert text(eject(rewritten)) == text(program)


def test_dynamic_slots_take_the_rank_as_a_size() -> None:
    program = captured_as("dynamic shapes")
    rewritten = rewrite(program, Slots(DENSE, max_rank=8, rank="dynamic"))
    run = rewritten.module()
    a, b, d = (dict(run.named_buffers())[f"slot.down.{n}"] for n in "abd")
    randomise((a, b, d))
    h = call(program, X)
    outputs = {r: run(X, active_rank=torch.zeros(r, dtype=torch.uint8)) for r in (2, 5, 8)}
    for r, output in outputs.items():
        model = net()
        weight = model.down.weight + (b[:r] * d[:r, None]).t() @ a[:r]
        model.down.weight = nn.Parameter(weight)
        assert (output - h).abs().max() > 0.01
        assert_close(output, model(X))
    with pytest.raises((RuntimeError, AssertionError), match="rank"):
        run(X, active_rank=torch.zeros(9, dtype=torch.uint8))
    assert text(eject(rewritten)) == text(program)


@pytest.mark.parametrize("form", ["training IR", "dynamic, inference"])
def test_a_programs_own_inputs_stay_behind_its_tensors(form: str) -> None:
    """As torch.export orders them: parameters, buffers, inputs; what calls bring for the adapter comes last."""
    program, lora = captured_as(form), LoraConfig(r=2, target_modules=DENSE)
    slots = rewrite(program, Slots(DENSE, max_rank=8, rank="dynamic"))
    for rewritten, brought in (
        (rewrite(program, lora), 0),
        (rewrite(program, lora, adapters="inputs"), 12),
        (slots, 1),
    ):
        specs = rewritten.graph_signature.input_specs
        kinds = [spec.kind.name for spec in specs]
        assert kinds == sorted(kinds, key=["PARAMETER", "BUFFER", "USER_INPUT"].index)
        own = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
        taken = [spec.arg.name for spec in specs if spec.kind.name == "USER_INPUT"]
        assert taken[: len(own)] == own
        assert len(taken) == len(own) + brought


# --- refused ---


def test_a_plan_of_the_live_model_has_to_fit() -> None:
    program = captured_as("training IR")
    plan = make_plan(net(), LoraConfig(r=4, target_modules="all-linear"))
    assert set(plan.sites) == {"block.up", "block.shared", "down"}
    assert call(rewrite(program, plan), X).shape == (3, 4, 6, 5)
    other = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 11)}), "extra": nn.Linear(2, 3)})
    plan = make_plan(other, LoraConfig(r=4, target_modules=["up", "extra"]))
    with pytest.raises(AdapterError, match=r"(?s)block.up: expected .*11.*found .*10.*extra: expected a linear"):
        rewrite(program, plan)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=4), "target_modules=None: what that means is read off a model"),
        (LoraConfig(r=4, target_modules="all-linear"), "'all-linear'"),
        (LoraConfig(r=4, target_modules=["nowhere"]), "no module of the model is a target"),
        (PromptTuningConfig(num_virtual_tokens=4), "prompt_tuning prepares the inputs of a model.*the live model"),
        (LoraConfig(r=4, target_modules=["up"], modules_to_save=["down"]), "need the live model"),
        (LoraConfig(r=3, target_modules=["grouped"]), "grouped: rank must be divisible"),
        (Slots(["up"], methods=("lora", "lola")), "methods: expected a sequence of some of"),
        (Slots(["up"], max_rank=1), "max_rank: expected at least 2, found 1"),
        (Slots(["nowhere"]), "no module of the model is a target"),
    ],
)
def test_what_a_program_cannot_take_is_refused(config: Any, message: str) -> None:
    program = captured_as("training IR")
    before = text(program)
    with pytest.raises(AdapterError, match=message):
        rewrite(program, config)
    assert text(program) == before


def test_another_adapter_at_the_same_site_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["up"])
    rewritten = rewrite(captured_as("training IR"), config)
    with pytest.raises(AdapterError, match=r"block.up: lora:default\neject them first"):
        rewrite(rewritten, config, name="more")
    both = rewrite(rewritten, LoraConfig(r=2, target_modules=["down"]), name="more")
    alone = eject(both, ["block.up"])
    assert {n.split(".")[1] for n in alone.state_dict if n.startswith("adapters")} == {"down"}
    with pytest.raises(AdapterError, match="no adapter is in the program"):
        eject(captured_as("training IR"))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


def test_a_convolution_that_pads_by_itself_is_named() -> None:
    """In the graph its input is padded already: A would see the padding, PEFT's does not."""
    program = export(Padded(), (torch.randn(2, 3, 7),))
    with pytest.raises(AdapterError, match=r"(?s)no module.*line: it pads its input itself"):
        rewrite(program, LoraConfig(r=2, target_modules=["line"]))


def test_functional_reads_are_named_after_their_weight() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight)

    model = Functional()
    rewritten = rewrite(export(model, (ROWS,)), LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    a, b = (rewritten.state_dict[f"adapters.inner.default.lora_{n}"] for n in "AB")
    weight = model.inner.weight + 4 * b @ a
    assert_close(call(rewritten, ROWS), F.linear(ROWS, weight))


def test_an_argument_named_like_a_builtin() -> None:
    """A copy of a graph renames it, and the program's signature would miss it."""
    model = nn.Sequential(nn.Linear(6, 4))
    program = export(model, (ROWS,))
    assert any(n.name == "input" for n in program.graph.nodes)
    rewritten = rewrite(program, LoraConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(rewritten.module()(ROWS), model(ROWS))
    assert text(eject(rewritten)) == text(program)
