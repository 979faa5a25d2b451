"""The plan says what add_adapter then does, survives its JSON, and tells two plans apart."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
from role_table import make
from tiny import conv_net, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

import fxpeft
from fxpeft import AdapterError, LoraConfig, Plan
from fxpeft.adapters.state import state_of
from fxpeft.passes.live import tracing
from fxpeft.planning import planner
from fxpeft.planning.table import collapse, size

CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"layers\.1\..*q_proj": 10},
}  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (tiny_llama, CONFIG),
        (tiny_llama, {"target_modules": "role:mlp", "use_rslora": True}),
        (lambda: tiny_llama(torch.bfloat16), {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
        (tiny_gpt2, {"target_modules": None, "lora_bias": True}),
        (tiny_bert, {"target_modules": "role:attention", "task_type": "SEQ_CLS", "bias": "lora_only"}),
        (conv_net, {"r": 4, "target_modules": "kind:conv"}),
    ],
)
def test_the_plan_is_what_add_adapter_does(factory: Any, options: dict[str, Any]) -> None:
    model, config = factory(), LoraConfig(**options)
    plan = fxpeft.plan(model, config)
    assert "_fxpeft" not in vars(model)
    fxpeft.add_adapter(model, config)
    adapter = state_of(model).adapters["default"]
    assert [(s.name, s.rank, s.scaling) for s in plan.sites] == [
        (n, p.rank, p.scaling) for n, p in adapter.plan.sites.items()
    ]
    for site in plan.sites:
        own = [p for n, p in adapter.parts[site.name].named_parameters() if n.startswith("lora")]
        assert site.parameters == sum(p.numel() for p in own)
        assert site.extra_bytes == sum(p.numel() * p.element_size() for p in own)
    assert plan.saved == tuple(adapter.plan.saved)
    assert plan.tensors == tuple(adapter.plan.tensors)
    names = {s.name for s in plan.sites} | {s.site for s in plan.skipped}
    assert names == {n for n, m in factory().named_modules() if isinstance(m, nn.Linear | nn.Embedding) or ("onv" in
                     type(m).__name__ and not list(m.children()))}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "flops"),
    [
        (fxpeft.LoraConfig(r=2, target_modules="role:attention.query", use_dora=True), 2 * (128 + 32), 2 * (256 + 32)),
        (fxpeft.IA3Config(target_modules="role:attention.key | role:mlp.down", feedforward_modules="role:mlp.down"),
         2 * (16 + 48), 2 * (16 + 48)),
        (fxpeft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules="role:mlp.up"), 2 * 3 * 81, None),
        (fxpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), 5 * 32, 0),
        (fxpeft.LoKrConfig(r=2, target_modules="role:attention.query"), 2 * (4 * 4 + 2 * 2 * 8), 2 * 2 * 32 * 32),
    ],
)  # fmt: skip
def test_every_method_has_a_plan(config: Any, parameters: int, flops: int | None) -> None:
    model = tiny_llama()
    plan = fxpeft.plan(model, config)
    assert plan.parameters == parameters
    assert flops is None or plan.flops == flops
    assert Plan.from_json(plan.to_json()) == plan
    fxpeft.apply(plan, model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert [s.name for s in plan.sites] == list(state_of(model).adapters["default"].plan.sites)
    if plan.flops:
        drawn = plan.draw().after
        assert {d["site"] for _, d in drawn.nodes(data=True) if d["new"]} == {
            s.name.removeprefix("model.layers.0.") for s in plan.sites if ".0." in s.name
        }
    else:
        with pytest.raises(AdapterError, match="rewrites no site"):
            plan.draw()


def test_sites_in_numbers() -> None:
    plan = fxpeft.plan(tiny_llama(), LoraConfig(**CONFIG))
    sites = {s.name: s for s in plan.sites}
    query, down = sites["model.layers.1.self_attn.q_proj"], sites["model.layers.0.mlp.down_proj"]
    tokens = sites["model.embed_tokens"]
    assert (query.role, query.kind, query.alpha, query.scaling) == ("attention.query", "linear", 10, 2.5)
    assert (query.parameters, query.extra_bytes, query.flops) == (256, 1024, 512)
    assert (down.role, down.in_features, down.out_features, down.rank) == ("mlp.down", 48, 32, 3)
    assert (down.parameters, down.flops) == (3 * (48 + 32), 2 * 3 * (48 + 32))
    assert (tokens.role, tokens.parameters, tokens.flops) == ("embedding.token", 4 * (40 + 32), 2 * 4 * 32)
    assert plan.parameters == sum(s.parameters for s in plan.sites) == 256 * 2 + 240 * 2 + 288


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_flops_are_those_that_torch_counts(layer: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(nn.Linear(12, 8) if layer == "linear" else nn.Conv1d(12, 8, 3, padding=1))
    x = torch.ones(7, 12) if layer == "linear" else torch.ones(1, 12, 7)

    def count() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        return counter.get_total_flops()

    config = LoraConfig(r=4, lora_alpha=5, target_modules=["0"])
    (site,) = fxpeft.plan(net, config, roles=False).sites
    before = count()
    fxpeft.add_adapter(net, config)
    assert count() - before == 7 * site.flops


def test_reasons_for_what_was_skipped() -> None:
    plan = fxpeft.plan(
        make("mixtral"),
        LoraConfig(
            target_modules="role:attention & out=32", exclude_modules="layers[0:1]", modules_to_save=["lm_head"]
        ),
    )
    assert [s.name for s in plan.sites] == [f"model.layers.1.self_attn.{p}_proj" for p in "qo"]
    reasons = {s.site: s.reason for s in plan.skipped}
    assert reasons["model.layers.0.self_attn.q_proj"] == "matches exclude_modules"
    assert reasons["model.layers.1.self_attn.k_proj"] == "is not out=32"
    assert reasons["model.layers.1.mlp.gate"] == "is not role:attention"
    assert reasons["model.layers.1.mlp.experts"] == "MixtralExperts is no kind of target"
    plain = fxpeft.plan(tiny_llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=0))
    reasons = {s.site: s.reason for s in plain.skipped}
    assert reasons["model.layers.1.self_attn.q_proj"] == "layer 1 is not in layers_to_transform"
    assert reasons["lm_head"] == "matches no target"


def test_a_plan_needs_no_weights() -> None:
    config = LoraConfig(**CONFIG)
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_llama().config)
    plan = fxpeft.plan(empty, config)
    assert plan == fxpeft.plan(tiny_llama(), config)
    model = tiny_llama()
    fxpeft.apply(plan, model, "planned")
    assert list(state_of(model).adapters["planned"].plan.sites) == [s.name for s in plan.sites]


def test_json_keeps_everything() -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="role:mlp | class:BertSelfAttention", rank_pattern={"role:mlp": 3},
        task_type="SEQ_CLS", bias="lora_only",
    )  # fmt: skip
    plan = fxpeft.plan(tiny_bert(), config)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert str(again) == str(plan)
    assert not plan.diff(again)
    fxpeft.apply(again, model := tiny_bert())
    assert "classifier" in state_of(model).adapters["default"].values.saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "expected JSON"),
        (lambda c: "[]", "expected an object with format 1, found 'list'"),
        (lambda c: json.dumps({**c, "format": 9}), "format 1, found 9"),
        (lambda c: json.dumps({**c, "config": None}), "expected a config, found None"),
        (lambda c: json.dumps({**c, "config": {**c["config"], "peft_type": "X"}}), "plan: peft_type: expected one of"),
        (lambda c: json.dumps({**c, "config": {**c["config"], "r": "x"}}), "plan: LoraConfig.r: expected int"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "sites"}), "found 'sites'"),
        (lambda c: json.dumps({**c, "sites": [{**c["sites"][0], "rank": "4"}]}), "found '4' where"),
        (lambda c: json.dumps({**c, "sites": [{"name": "x"}]}), "where PlanRow was expected"),
        (lambda c: json.dumps({**c, "notes": [1]}), "found 1 where str was expected"),
    ],
)
def test_what_is_no_plan_is_refused(change: Any, message: str) -> None:
    content = json.loads(fxpeft.plan(tiny_llama(), LoraConfig(**CONFIG), roles=False).to_json())
    with pytest.raises(AdapterError, match=message):
        Plan.from_json(change(content))


def test_a_plan_for_another_model_is_refused_before_anything_changes() -> None:
    plan = fxpeft.plan(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), roles=False)
    other = tiny_llama()
    other.model.layers[0].self_attn.k_proj = nn.Linear(32, 20)
    other.model.layers[1].self_attn.q_proj = nn.Identity()
    other.model.layers[1].self_attn.extra = nn.ModuleDict({"q_proj": nn.Linear(3, 4)})
    plan.config.target_modules = r".*(k_proj|layers\.0.*q_proj|extra\.q_proj)"
    with pytest.raises(AdapterError, match="made for another model") as caught:
        fxpeft.apply(plan, other)
    for line in (
        r"layers.0.self_attn.k_proj: the plan has ('linear', 32, 16, 4, 2.0), the model ('linear', 32, 20, 4, 2.0)",
        r"layers.1.self_attn.q_proj: the plan has ('linear', 32, 32, 4, 2.0), the model no such site",
        r"layers.1.self_attn.extra.q_proj: the plan has no such site, the model ('linear', 3, 4, 4, 2.0)",
    ):
        assert line in str(caught.value)
    assert "_fxpeft" not in vars(other)


def test_diff() -> None:
    model = tiny_llama()
    before = fxpeft.plan(model, LoraConfig(**CONFIG))
    after = fxpeft.plan(model, LoraConfig(r=8, lora_alpha=6, target_modules="role:attention.{query,key}"))
    diff = before.diff(after)
    assert diff
    assert diff.config["r"] == (4, 8)
    assert [s.name for s in diff.added] == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert {s.role for s in diff.removed} == {"mlp.down", "embedding.token"}
    assert diff.changed["model.layers.0.self_attn.q_proj"]["rank"] == (4, 8)
    lines = str(diff).splitlines()
    assert "r: 4 -> 8" in lines
    assert "+ model.layers.{0-1}.self_attn.k_proj" in lines
    assert "- model.embed_tokens" in lines
    assert lines[-1] == f"parameters: {before.parameters:,} -> {after.parameters:,}"
    assert str(before.diff(before)) == "no difference"


def test_the_table_has_one_row_for_layers_that_are_alike() -> None:
    text = str(fxpeft.plan(tiny_llama(), LoraConfig(r=4, target_modules="role:mlp | lm_haed & kind:linear")))
    rows = [line.split() for line in text.splitlines()]
    assert ["model.layers.{0-1}.mlp.down_proj", "mlp.down", "linear", "2", "48", "32", "4", "8", "640", "2.56k",
            "1.28k", "416"] in rows  # fmt: skip
    assert sum("mlp." in line and "linear" in line for line in text.splitlines()) == 3
    assert "target_modules: lm_haed matches none of 16 sites; nearest: lm_head" in text


def test_a_plan_without_roles_says_so() -> None:
    class Silent(nn.Sequential):
        pass

    plan = fxpeft.plan(Silent(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    assert plan.sites[0].role == ""
    assert any(note.startswith("no roles: Silent doesn't say what its inputs are") for note in plan.notes)
    told = fxpeft.plan(Silent(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]), inputs={"input": torch.ones(2, 4)})
    assert told.sites[0].role == "head"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0-2}.b"]),
        (["a.0.b", "a.2.b", "a.3.b", "x"], ["a.{0,2-3}.b", "x"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0-1}.b.{0-1}"]),
        (["a.0.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.1"]),
        (["a.7.q1", "a.8.q1"], ["a.{7-8}.q1"]),
    ],
)
def test_collapse(names: list[str], expected: list[str]) -> None:
    assert collapse(names) == expected


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1234, 5_600_000, 7e9, 8e12)] == ["0", "999", "1.23k", "5.6M", "7G", "8T"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_plan_that_0_1_0_pickled_loads() -> None:
    """There a plan and its rows were ``fxpeft.planner.Plan`` and ``fxpeft.planner.PlanSite``."""
    plan = fxpeft.plan(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    text = pickle.dumps(plan, protocol=0)
    old = text.replace(b"fxpeft.planning.data\nPlanRow", b"fxpeft.planner\nPlanSite")
    old = old.replace(b"fxpeft.planning.planner\nPlan", b"fxpeft.planner\nPlan")
    assert b"fxpeft.planning" not in old
    assert pickle.loads(old) == plan


def test_the_model_is_traced_where_roles_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, model = [], tiny_llama()
    for name in ("roles_of", "model_flow"):
        real = getattr(planner, name)
        monkeypatch.setattr(planner, name, lambda *args, real=real, name=name: asked.append(name) or real(*args))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_haed"])
    whole = {
        "print": str, "role": lambda plan: plan.sites[1].role, "row": lambda plan: repr(plan.sites[0]),
        "skipped": lambda plan: plan.skipped, "notes": lambda plan: plan.notes,
    }  # fmt: skip
    flow: dict[str, Any] = {"draw": lambda plan: plan.draw(), "pickle": pickle.dumps, "copy": copy.deepcopy}
    for name, ask in {**whole, "json": lambda plan: plan.to_json(), **flow}.items():
        plan = fxpeft.plan(model, config)
        assert [site.name[-6:] for site in plan.sites] == ["q_proj", "q_proj"]
        assert plan.parameters == 2 * 3 * 64
        fxpeft.apply(plan, tiny_llama())
        assert asked == []  # they took 15 seconds for 32 layers
        for _ in range(2):
            ask(plan)
        assert asked.count("roles_of") == (name != "draw")
        assert asked.count("model_flow") == (name in flow), name
        asked.clear()
    plan = fxpeft.plan(model, config)
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan) == Plan.from_json(plan.to_json())
    assert plan.sites[0].role == "attention.query"
    assert any("mlp" in skip.site for skip in plan.skipped)
    assert [note.partition(";")[0] for note in plan.notes] == ["target_modules: lm_haed matches none of 16 sites"]
    with pytest.raises(AttributeError, match="'Plan' object has no attribute 'rolls'"):
        plan.rolls  # noqa: B018


def test_a_plan_lets_its_model_go_once_it_told_all() -> None:
    config, model = LoraConfig(target_modules=["q_proj"]), tiny_llama()
    known, printed = weakref.ref(model), fxpeft.plan(model, config)
    bare = fxpeft.plan(model, config, roles=False)
    del model
    assert bare.sites[0].role == ""
    assert bare.flow is None
    assert "attention.query" in str(printed)
    assert printed.flow is not None
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("targets", ["all-linear", [f"model.layers.{i}.mlp.up_proj" for i in range(2)]])
def test_no_module_is_traced_twice(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    traced: list[str] = []
    real = tracing.trace_any
    monkeypatch.setattr(tracing, "trace_any", lambda module: traced.append(type(module).__name__) or real(module))
    for _ in range(2):
        fxpeft.plan(model, LoraConfig(target_modules=targets), roles=False)
    assert len(traced) == len(set(traced))  # each norm was, with each plan: most of the time that one took
