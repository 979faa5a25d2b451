"""Patterns as ``target_modules``: the same sites in fxpeft and, from what was saved, in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig, pattern
from fxpeft.adapters.state import state_of
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.patterns import layers, name, role
from fxpeft.targets.resolve import spelled
from fxpeft.targets.sites import make_plan

IDS = torch.arange(12).view(2, 6)
Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
K = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def sites(model: nn.Module) -> list[str]:
    return list(state_of(model).adapters["default"].plan.sites)


def adapted(targets: Any, factory: Callable[[], Any] = tiny_llama, **options: Any) -> Any:
    model = factory()
    fxpeft.add_adapter(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **options}))
    return model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("role:attention.query", Q),
        (role("attention.query") & layers[-1], Q[1:]),
        (pattern("q_proj & ~name:model.layers.0.**"), Q[1:]),
        (pattern("q_proj"), Q),
        (["q_proj", "role:mlp.down & layers[:1]"], [Q[0], DOWN[0], Q[1]]),
        ("class:LlamaMLP & out=32", DOWN),
        ("kind:linear & out=16 & re:.*k_.*", K),
        (r".*\.q_proj", Q),
    ],
)
def test_a_pattern_selects_the_sites(targets: Any, expected: list[str]) -> None:
    assert sites(adapted(targets)) == expected


def test_peft_loads_what_was_saved_to_the_same_outputs(tmp_path: Path) -> None:
    model = adapted(
        "(role:attention.query | role:mlp.down) & layers[1:]", exclude_modules="name:**.lm_head | in>40",
        rank_pattern={"role:attention": 3}, alpha_pattern={"class:LlamaAttention & layers[1:]": 7},
    )  # fmt: skip
    randomise(p for n, p in model.named_parameters() if "lora_" in n)
    assert sites(model) == Q[1:]
    fxpeft.save_adapter(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == Q[1:]
    assert saved["exclude_modules"] is None
    assert saved["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 3}
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        ours, base = model(IDS).logits, tiny_llama()(IDS).logits
        assert (ours - base).abs().max() > 1e-3
        assert_close(theirs(IDS).logits, ours)
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, ours)
    assert state_of(again).adapters["default"].plan.sites == state_of(model).adapters["default"].plan.sites


def test_rank_and_alpha_patterns_take_patterns() -> None:
    model = adapted(
        "role:attention | role:mlp.down",
        rank_pattern={"role:attention & layers[0:1]": 4, "down_proj": 3, "role:attention": 6},
        alpha_pattern={"layers[1:]": 9},
    )
    plans = state_of(model).adapters["default"].plan.sites
    assert {s: p.rank for s, p in plans.items() if s in (*Q, *DOWN)} == {Q[0]: 4, Q[1]: 6, **dict.fromkeys(DOWN, 3)}
    assert [plans[s].scaling for s in (*Q, *DOWN)] == [5 / 4, 9 / 6, 5 / 3, 9 / 3]


def test_exclude_alone_can_be_a_pattern() -> None:
    both = ["q_proj", "k_proj"]
    assert sites(adapted(both, exclude_modules="layers[0:1] & role:attention.key")) == [Q[0], Q[1], K[1]]
    assert sites(adapted("all-linear", exclude_modules=~name("**.q_proj"))) == Q
    assert sites(adapted(both, layers_to_transform=1, exclude_modules="role:*.key")) == Q[1:]


def test_modules_to_save_are_left_out_as_with_peft() -> None:
    assert "lm_head" in sites(adapted("kind:linear"))
    assert "lm_head" not in sites(adapted("kind:linear", modules_to_save=["lm_head"]))


def test_a_rank_pattern_is_asked_about_sites_not_about_modules_to_save() -> None:
    config = LoraConfig(
        r=2, target_modules="kind:linear & ~name:**.attention.**", modules_to_save=["classifier"],
        rank_pattern={"kind:linear & in=24": 5}, alpha_pattern={"name:**.output.dense": 7},
    )  # fmt: skip
    plan = make_plan(tiny_bert(), config)
    layers = {
        f"bert.encoder.layer.{i}.{part}.dense": r for i in (0, 1) for part, r in (("intermediate", 5), ("output", 2))
    }
    assert {site: own.rank for site, own in plan.sites.items()} == {**layers, "bert.pooler.dense": 5}
    assert {site for site, own in plan.sites.items() if own.scaling == 7 / 2} == {s for s in layers if "output" in s}
    assert plan.saved == ["classifier"]
    assert not any("classifier" in key for key in plan.config.rank_pattern)  # type: ignore[attr-defined]
    lost = LoraConfig(target_modules="kind:linear", modules_to_save=["classifier"], rank_pattern={"out=3": 5})
    with pytest.raises(AdapterError, match=r"rank_pattern='out=3' selects nothing"):
        make_plan(tiny_bert(), lost)


def test_prepare_hotswap_takes_patterns() -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets="role:attention & out=16 | role:mlp.down", exclude=layers[0])
    assert list(state_of(model).serving.kinds) == [K[1], "model.layers.1.self_attn.v_proj", DOWN[1]]


def test_gpt2s_transposed_linears_have_shape_and_kind() -> None:
    targets = "kind:linear & in=24 & out=72"
    assert sites(adapted(targets, tiny_gpt2)) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]


class Nested(nn.Module):
    """Names that are suffixes of other names: a list would take too much in PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.part = nn.Linear(4, 3), nn.ModuleDict({"proj": nn.Linear(3, 5), "one": nn.Linear(5, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.part["one"](self.part["proj"](self.proj(x)))


def test_names_that_are_suffixes_of_others_are_saved_exactly(tmp_path: Path) -> None:
    model = adapted("in=4 | part.one", Nested, rank_pattern={"in=4": 1})
    assert sites(model) == ["proj", "part.one"]
    assert fxpeft.adapter_config(model).target_modules == r"proj|part\.one"
    fxpeft.save_adapter(model, tmp_path)
    theirs = peft.get_peft_model(Nested(), peft.LoraConfig.from_pretrained(tmp_path))
    ranks = {n.removesuffix(".lora_A.default").removeprefix("base_model.model."): m.out_features
             for n, m in theirs.named_modules() if n.endswith("lora_A.default")}  # fmt: skip
    assert ranks == {"proj": 1, "part.one": 2}


def test_spelled_selects_exactly_what_was_meant() -> None:
    modules = dict(Nested().named_modules())
    for chosen in (["part.proj"], ["proj"], ["proj", "part.proj"], ["part.one"]):
        assert NameSelector(spelled(chosen, modules)).select(modules) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "role:attention.qury"}, "nothing:\n.*qury matches none of .*; nearest: attention.query"),
        ({"target_modules": "class:LlamaMPL"}, "nearest: LlamaMLP"),
        ({"target_modules": "name:model.layers.*.self_atn.q_proj"}, r"nearest: model\.layers\.0\.self_attn\.q_proj"),
        ({"target_modules": "in=4096"}, "in=4096 matches none of .*; nearest: in="),
        ({"target_modules": "q_proj & role:mlp"}, "each term matches some site, but no site matches all of them"),
        ({"target_modules": "role:mlp &"}, r"target_modules: expected a term\n  role:mlp &\n            \^"),
        ({"target_modules": ["kind:lineer"]}, "target_modules: kind: expected one of linear"),
        ({"target_modules": ["q_proj"], "exclude_modules": "role:router"}, "exclude_modules='role:router' selects no"),
        ({"target_modules": ["q_proj"], "exclude_modules": "role:attention"}, "leaves out all of"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"role:mlp": 3}}, "rank_pattern='role:mlp' selects nothing"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"role:": 3}}, "rank_pattern: expected something after role:"),
        ({"target_modules": "role:mlp", "layers_to_transform": 1}, "layers_to_transform can't be used"),
        ({"target_modules": pattern("q_proj"), "layers_to_transform": 1}, "when target_modules is a pattern"),
        ({"target_modules": ["a", "role:mlp"], "layers_to_transform": 1}, "when target_modules is a pattern"),
    ],
)  # fmt: skip
def test_errors_say_what_is_near_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, LoraConfig(r=2, **options))
    assert "_fxpeft" not in vars(model)


def test_a_role_that_no_rewrite_can_take_is_named() -> None:
    from role_table import make

    model = make("mixtral")
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.experts: MixtralExperts is no kind of target"):
        fxpeft.add_adapter(model, LoraConfig(target_modules="role:experts"))


@pytest.mark.parametrize(
    "targets", [pattern("q_proj | k_proj"), role("mlp") & "layers[0:1]", ["lm_head", "out=16"], "role:mlp"]
)
def test_an_unresolved_config_survives_its_json(targets: Any) -> None:
    config = LoraConfig(target_modules=targets)
    again = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert sites(adapted(again.target_modules)) == sites(adapted(targets))


def test_a_second_adapter_by_a_pattern_finds_what_the_first_one_found() -> None:
    """Of Transformers' Conv1D, whose kind is read off its graph: what fxpeft put below it makes it no container."""
    model = adapted("kind:linear", factory=tiny_gpt2)
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules="kind:linear"), "other")
    own = state_of(model).adapters
    assert list(own["other"].plan.sites) == list(own["default"].plan.sites)
    assert len(own["other"].plan.sites) == 9
