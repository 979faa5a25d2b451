"""Experts of captured programs: PEFT's files for ``target_parameters``, beside PEFT's model and the live one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peer_versions import STACKS, since
from tiny import VOCABULARY, randomise, token_ids
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxpeft
from fxpeft import AdapterError, LoraConfig, Slots
from fxpeft.targets.sites import make_plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "initializer_range": 0.2, "num_local_experts": 3,
}  # fmt: skip
IDS = token_ids()


def mixtral(implementation: str = "batched_mm") -> nn.Module:
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER))
    model.set_experts_implementation(implementation)
    return model.eval()


def gpt_oss(implementation: str = "batched_mm") -> nn.Module:
    """Its experts are stored [experts, in, out]."""
    torch.manual_seed(0)
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER, head_dim=6, pad_token_id=0))
    model.set_experts_implementation(implementation)
    randomise((p for n, p in model.named_parameters() if n.endswith(("bias", "sinks"))), seed=5)
    return model.eval()


class Stacks(nn.Module):
    """Llama 4's way: every expert for every token, stored [experts, in, out], and the module doesn't say so."""

    def __init__(self, size: int = 5, inner: int = 7, out: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, inner, out) / 3)  # declared before it is used
        self.up = nn.Parameter(torch.randn(3, size, inner) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[3 * tokens, size]``."""
        h = torch.bmm(x.view(3, -1, x.shape[-1]), self.up)
        return torch.bmm(torch.tanh(h), self.down).flatten(0, 1)


class Net(nn.Module):
    """Stacks in a module of their own, between linears."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.stacks = Stacks(*sizes)
        self.into = nn.Linear(6, self.stacks.up.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[3 * tokens, 6]``."""
        return self.stacks(self.into(x))  # type: ignore[no-any-return]


def net(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return Net(*sizes).eval()


def saved(model: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """PEFT's folder for a random adapter of the model; PEFT's model with it, freshly loaded."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS, **config}
    peer = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    randomise((p for n, p in peer.named_parameters() if "lora_" in n), seed=2)
    peer.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def exported(model: nn.Module, form: str = "training IR") -> ExportedProgram:
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    return program.run_decompositions() if form == "inference IR" else program


def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits.detach()  # type: ignore[no-any-return]


def text(program: Any) -> str:
    return str(program.graph)


@pytest.mark.parametrize(
    ("build", "implementation", "form"),
    [
        (mixtral, "batched_mm", "training IR"),
        (mixtral, "grouped_mm", "inference IR"),
        (gpt_oss, "batched_mm", "inference IR"),
        (gpt_oss, "grouped_mm", "training IR"),
    ],
    ids=["mixtral, batched", "mixtral, grouped, inference IR", "gpt-oss, batched, inference IR", "gpt-oss, grouped"],
)
def test_a_folder_of_peft_goes_into_a_program(
    build: Callable[[str], nn.Module], implementation: str, form: str, tmp_path: Path
) -> None:
    model = build(implementation)
    settings = {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 1, "q_proj": 5}, "use_rslora": True}
    peer = saved(model, tmp_path, **settings, alpha_pattern={r"layers\.1\..*gate_up_proj": 2})
    program = exported(model, form)
    rewritten = fxpeft.rewrite(program, tmp_path)
    found = logits(rewritten.module())
    assert (found - logits(model)).abs().max() > 0.5
    torch.testing.assert_close(found, logits(peer), rtol=0, atol=2e-5)
    fxpeft.load_adapter(model, tmp_path)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=2e-5)
    back = fxpeft.eject(rewritten)
    assert text(back) == text(program)
    assert sorted(back.state_dict) == sorted(program.state_dict)
    assert fxpeft.rewrite(rewritten, tmp_path) is rewritten


def test_a_grouped_product_of_torch_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # the model's own products want widths of 8
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**{**DECODER, "intermediate_size": 40})).eval().to(torch.bfloat16)
    peer = saved(model, tmp_path, rank_pattern={"down_proj": 9})
    program = exported(model)
    assert "aten._grouped_mm.default" in text(program)
    rewritten = fxpeft.rewrite(program, tmp_path)
    found, expected, bare = logits(rewritten.module()), logits(peer), logits(model)
    assert (expected - bare).abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert text(fxpeft.eject(rewritten)) == text(program)
    assert fxpeft.rewrite(program, Slots([], max_rank=6, parameters=EXPERTS)) is not program
    with pytest.raises(
        AdapterError, match=r"a number of ranks that changes .* multiples of 16 bytes; use rank='static'"
    ):
        fxpeft.rewrite(program, Slots([], max_rank=6, parameters=EXPERTS, rank="dynamic"))


@since(*STACKS)
def test_only_some_are_taken_out(tmp_path: Path) -> None:
    model = mixtral()
    saved(model, tmp_path)
    program = exported(model)
    rewritten = fxpeft.rewrite(program, tmp_path)
    some = fxpeft.eject(rewritten, ["gate_up_proj"])
    alone = tmp_path / "alone"
    peer = saved(model, alone, target_parameters=["experts.down_proj"])
    with torch.no_grad():
        for name, own in some.state_dict.items():
            if "lora_" in name:
                part = peer.get_parameter(_peft_name(name))
                own.copy_(part)
    torch.testing.assert_close(logits(some.module()), logits(peer), rtol=0, atol=2e-5)
    assert text(fxpeft.eject(some)) == text(program)


def _peft_name(name: str) -> str:
    site, _, factor = name.removeprefix("adapters.").partition(".down_proj.default.")
    return f"base_model.model.{site}.{factor}.default.weight"


BOTH_STACKS = ["stacks.up", "stacks.down"]


def captured(model: nn.Module, x: Tensor, form: str) -> Any:
    if form == "functional":
        return torch.fx.symbolic_trace(model)
    if form == "dynamo":
        return torch._dynamo.export(model, aten_graph=False)(x).graph_module
    program = torch.export.export(model, (x,))
    return program.module() if form == "module" else program


@since(*STACKS)
@pytest.mark.parametrize("sizes", [(5, 7, 4), (4, 6, 4)])
@pytest.mark.parametrize("form", ["exported", "module", "functional", "dynamo"])
def test_stacks_whose_module_does_not_say_how_they_lie(form: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    model, x = net(*sizes), torch.randn(6, 6)
    own = BOTH_STACKS if form == "exported" else BOTH_STACKS[:1]
    peer = saved(model, tmp_path, target_modules=["into"], target_parameters=own)
    assert peer.base_model.model.stacks.lora_A["default"].weight.shape == (9, sizes[1])  # type: ignore
    program = captured(model, x, form)
    rewritten = fxpeft.rewrite(program, tmp_path)
    run = rewritten.module() if form == "exported" else rewritten
    assert (peer(x) - model(x)).abs().max() > 0.1
    torch.testing.assert_close(run(x), peer(x), rtol=0, atol=1e-5)
    assert text(fxpeft.eject(rewritten)) == text(program)


@pytest.mark.parametrize("form", ["module", "functional"])
def test_several_stacks_of_a_module_need_the_model(form: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(6, 6)
    peer = saved(model, tmp_path, target_parameters=BOTH_STACKS)
    program = captured(model, x, form)
    with pytest.raises(AdapterError, match=r"down and stacks.up: a graph module does not tell .* make the plan with"):
        fxpeft.rewrite(program, tmp_path)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=BOTH_STACKS)
    rewritten = fxpeft.rewrite(program, make_plan(model, config), state_dict=peft.get_peft_model_state_dict(peer))
    torch.testing.assert_close(rewritten(x), peer(x), rtol=0, atol=1e-5)
    assert text(fxpeft.eject(rewritten)) == text(program)


@since(*STACKS)
def test_a_square_stack_needs_the_model(tmp_path: Path) -> None:
    model, x = net(5, 5, 4), torch.randn(6, 6)
    peer = saved(model, tmp_path, target_parameters=["stacks.up"])
    program = torch.export.export(model, (x,))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=["stacks.up"])
    tensors = peft.get_peft_model_state_dict(peer)
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for source, own in ((tmp_path, None), (config, tensors), (config, bare)):
        with pytest.raises(AdapterError, match=r"stacks.up is square, .*is_transposed.* make the plan with the model"):
            fxpeft.rewrite(program, source, state_dict=own)  # type: ignore[arg-type]
    rewritten = fxpeft.rewrite(program, make_plan(model, config), state_dict=tensors)
    torch.testing.assert_close(rewritten.module()(x), peer(x), rtol=0, atol=1e-5)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = make_plan(net(5, 8, 4), LoraConfig(r=3, target_modules=[], target_parameters=["stacks.up"]))
    program = torch.export.export(net(), (torch.randn(6, 6),))
    with pytest.raises(AdapterError, match=r"(?s)stacks.up: expected .*8.*found .*7"):
        fxpeft.rewrite(program, plan)


def test_a_fresh_adapter_trains_as_the_live_one() -> None:
    model, config = mixtral(), LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=EXPERTS)
    program = exported(model)
    rewritten = fxpeft.rewrite(program, config)
    run: Any = rewritten.module()
    torch.testing.assert_close(logits(run), logits(model), rtol=0, atol=1e-5)
    own = {n: p for n, p in run.named_parameters() if "lora_" in n}
    assert len(own) == 8
    randomise(own.values())
    fxpeft.add_adapter(model, config)
    live = {n: p for n, p in model.named_parameters() if "lora_" in n}
    randomise(live.values())
    for each, factors in ((run, own), (model, live)):
        each(IDS, use_cache=False).logits.square().mean().backward()
        assert all(p.grad is not None for p in factors.values())
    by_site = {_live_name(name): p for name, p in live.items()}
    for name, p in own.items():
        torch.testing.assert_close(p, by_site[name])
        torch.testing.assert_close(p.grad, by_site[name].grad, rtol=1e-3, atol=1e-5)


def _live_name(name: str) -> str:
    site, _, rest = name.partition(".adapters.default.")
    leaf, _, factor = rest.rpartition(".")
    return f"adapters.{site}.{leaf}.default.{factor}"


def test_tensors_as_inputs(tmp_path: Path) -> None:
    model = mixtral()
    peer = saved(model, tmp_path)
    rewritten = fxpeft.rewrite(exported(model), tmp_path, adapters="inputs")
    tensors = fxpeft.adapter_inputs(rewritten)
    run = rewritten.module()
    found = run(IDS, use_cache=False, adapters=tensors).logits
    torch.testing.assert_close(found, logits(peer), rtol=0, atol=2e-5)
    off = {name: torch.zeros_like(value) for name, value in tensors.items()}
    bare = run(IDS, use_cache=False, adapters=off).logits
    torch.testing.assert_close(bare, logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("rank", ["static", "dynamic"])
def test_slots_are_swapped_by_copies(implementation: str, rank: Any, tmp_path: Path) -> None:
    model = mixtral(implementation)
    program = exported(model)
    slots = Slots(["q_proj"], max_rank=6, rank=rank, parameters=EXPERTS)
    rewritten = fxpeft.rewrite(program, slots)
    run: Any = rewritten.module()
    buffers = dict(run.named_buffers())
    for seed, r in enumerate((4, 2, 6)):
        randomised = mixtral(implementation)
        config = LoraConfig(r=r, lora_alpha=5, target_modules=["q_proj"], target_parameters=EXPERTS)
        fxpeft.add_adapter(randomised, config)
        randomise((p for n, p in randomised.named_parameters() if "lora_" in n), seed=seed)
        _fill(buffers, randomised, config)
        more = {} if rank == "static" else {"active_rank": torch.zeros(r, dtype=torch.uint8)}
        found = run(IDS, use_cache=False, **more).logits
        torch.testing.assert_close(found, logits(randomised), rtol=0, atol=2e-5)
        assert (found - logits(model)).abs().max() > 0.5
    assert text(fxpeft.eject(rewritten)) == text(program)


@torch.no_grad()
def _fill(buffers: dict[str, Tensor], live: nn.Module, config: LoraConfig) -> None:
    """Copy an adapter of the live model into a program's slots."""
    plan, tensors = make_plan(live, config), dict(live.named_parameters())
    for site, own in plan.sites.items():
        kind = own.kind
        place = f"{kind.host(site)}.adapters.default.{kind.leaf + '.' if kind.leaf else ''}"
        a, b = kind.ranks(tensors[f"{place}lora_A"]), kind.rows(tensors[f"{place}lora_B"])
        for name, value in (("a", a), ("b", b), ("d", torch.full((own.rank,), own.scaling))):
            buffers[f"slot.{site}.{name}"].zero_()[: own.rank].copy_(value)


class Chosen(Stacks):
    """An expert for each token, as ``batched_mm`` does it."""

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[tokens, size]``."""
        experts = x.abs().sum(-1).long() % 3
        h = torch.bmm(self.up.transpose(1, 2)[experts], x.unsqueeze(-1))
        return torch.bmm(self.down.transpose(1, 2)[experts], torch.tanh(h)).squeeze(-1)


@pytest.mark.slow
def test_compiled_slots_take_every_rank_without_compiling_again() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"all": Stacks(), "chosen": Chosen()}), torch.randn(6, 5)
    model.forward = lambda x: model["all"](x) + model["chosen"](x)  # type: ignore[method-assign]
    program = torch.export.export(model, (x,), strict=False)
    run = fxpeft.rewrite(program, Slots([], max_rank=20, rank="dynamic", parameters=["up", "down"])).module()
    buffers = {n.removeprefix("slot."): b for n, b in run.named_buffers()}
    randomise(buffers.values())
    compiled = torch.compile(run)
    for count, rank in enumerate((4, 2, 20, 17)):
        live = copy.deepcopy(model)
        for site in ("all.up", "all.down", "chosen.up", "chosen.down"):
            a, b, d = (buffers[f"{site}.{name}"][:rank] for name in "abd")
            with torch.no_grad():
                live.get_parameter(site).add_(torch.einsum("rei,reo,r->eio", a, b, d))
        carrier = torch.zeros(rank, dtype=torch.uint8)
        if not count:
            torch._dynamo.mark_dynamic(carrier, 0)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=count > 0):
            found = compiled(x, active_rank=carrier)
        expected = live["all"](x) + live["chosen"](x)  # type: ignore[operator]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (expected - model(x)).abs().max() > 0.1


class Branching(Net):
    """The stacks in the bodies of a higher-order operator."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return torch.cond(h.sum() > 0, lambda h: self.stacks(h), lambda h: self.stacks(h) * 2, (h,))  # type: ignore


def test_stacks_in_bodies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(6, 6)
    peer = saved(net(), tmp_path, target_parameters=BOTH_STACKS)
    program = torch.export.export(model, (x,), strict=True)
    rewritten = fxpeft.rewrite(program, tmp_path)
    run, into = rewritten.module(), net().into
    for value in (x, -x):
        expected = peer(value) * (1 if into(value).sum() > 0 else 2)
        torch.testing.assert_close(run(value), expected, rtol=0, atol=1e-5)
        assert (expected - model(value)).abs().max() > 0.1
    assert text(fxpeft.eject(rewritten)) == text(program)


# --- refused ---


class Read(Net):
    """A stack that something else reads too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.stacks.up.mean()


def test_a_stack_that_is_read_elsewhere_is_refused() -> None:
    program = torch.export.export(Read().eval(), (torch.randn(6, 6),))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["stacks.up"])
    with pytest.raises(AdapterError, match=r"missing there.*\n.*stacks.up: is read by aten.mean.default too"):
        fxpeft.rewrite(program, config)
    other = LoraConfig(r=2, target_modules=[], target_parameters=["stacks.down"])
    assert text(fxpeft.rewrite(program, other)) != text(program)


class Einsum(nn.Module):
    """A product that is no operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ParameterList([nn.Parameter(torch.randn(3, 5, 7))])
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("eti,eio->eto", x, self.stacks[0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=[], target_parameters=["stacks.0"])])
def test_what_no_operation_reads_is_named(config: LoraConfig) -> None:
    program = torch.export.export(Einsum(), (torch.randn(3, 4, 5),))
    with pytest.raises(AdapterError, match=r"(?s)no modules whose parameters.*stacks.0: aten.einsum.default reads it"):
        fxpeft.rewrite(program, config)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["q_proj.weight"], "q_proj.weight: a program takes parameters that are stacks of matrices"),
        (["nowhere"], "no parameter of the model is named"),
        (["gate_up"], "no parameter of the model is named"),
    ],
)
def test_other_parameters_are_refused(parameters: list[str], message: str) -> None:
    program = exported(mixtral())
    before = text(program)
    with pytest.raises(AdapterError, match=message):
        fxpeft.rewrite(program, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    assert text(program) == before
