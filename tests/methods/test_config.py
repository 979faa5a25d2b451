"""Configs: PEFT's names and defaults, checked values, PEFT's JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from peer_versions import installed
from torch import nn

import fxpeft
from fxpeft import AdapterError, LoraConfig


class Block(nn.Module):
    """One numbered layer of the model below."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 4), nn.Linear(6, 4)


class Layers(nn.Module):
    """Three numbered layers and a head; never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.head = nn.Linear(4, 2)


def default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]


def test_fields_and_defaults_are_pefts() -> None:
    theirs = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
    ours = {f.name: f for f in dataclasses.fields(LoraConfig)}
    unsupported = LoraConfig.unsupported
    known = {*ours, *unsupported, "peft_type", "peft_version", "runtime_config"}
    assert set(theirs) <= known
    assert set(ours) <= set(theirs)
    assert set(theirs) == known or installed < (0, 21)
    assert {n: default_of(f) for n, f in ours.items()} == {n: default_of(theirs[n]) for n in ours}
    assert {n: default_of(theirs[n]) for n in unsupported if n in theirs}.items() <= unsupported.items()


WRONG: list[tuple[str, Any]] = [
    ("task_type", 3),
    ("task_type", "CAUSAL"),
    ("base_model_name_or_path", 3),
    ("revision", 1),
    ("inference_mode", "yes"),
    ("inference_mode", 1),
    ("auto_mapping", []),
    ("target_modules", 7),
    ("target_modules", ["q_proj", 7]),
    ("target_modules", "(q_proj"),
    ("exclude_modules", 7),
    ("exclude_modules", "*q"),
    ("modules_to_save", "head"),
    ("modules_to_save", [1]),
    ("layers_to_transform", "1"),
    ("layers_to_transform", [1, "2"]),
    ("layers_to_transform", True),
    ("layers_pattern", 3),
    ("layers_pattern", "layers"),  # without layers_to_transform
    ("r", "8"),
    ("r", 8.0),
    ("r", True),
    ("r", None),
    ("r", 0),
    ("r", -2),
    ("lora_alpha", "16"),
    ("lora_alpha", True),
    ("lora_alpha", None),
    ("use_rslora", 1),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"r": 0}),
    ("rank_pattern", {"(q_proj": 4}),
    ("rank_pattern", {3: 4}),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"q_proj[": 4}),
    ("lora_dropout", "0.1"),
    ("lora_dropout", -0.1),
    ("lora_dropout", 1.0),
    ("lora_dropout", float("nan")),
    ("bias", "some"),
    ("bias", None),
    ("init_lora_weights", "cordb"),
    ("init_lora_weights", 1),
    ("lora_bias", "no"),
    ("fan_in_fan_out", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_names_the_field(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=rf"\b{name}\b"):
        LoraConfig(**{name: value})
    with pytest.raises(AdapterError, match=rf"(?s)here\.json.*\b{name}\b"):
        LoraConfig.from_dict({name: value}, source="here.json")


def test_lora_bias_with_gaussian_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"lora_bias.*init_lora_weights"):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", ("v_proj", "q_proj")),
        ("target_modules", {"v_proj", "q_proj"}),
        ("exclude_modules", {"head"}),
        ("target_parameters", {"experts.gate_up_proj", "experts.down_proj"}),
        ("layers_to_transform", [0, 2]),
        ("lora_alpha", 0.5),
        ("lora_dropout", 0),
        ("alpha_pattern", {"q_proj": 1.5}),
        ("rank_pattern", None),
        ("init_lora_weights", "gaussian"),
        ("auto_mapping", {"base_model_class": "Layers", "unsloth_fixed": True}),
        ("task_type", peft.TaskType.CAUSAL_LM),
    ],
)
def test_value_in_use_elsewhere_is_taken(name: str, value: object) -> None:
    config = LoraConfig(**{name: value})
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("kasa_config", True, "unsupported"),
        ("qalora_group_size", 32, "unsupported"),
        ("use_sparkles", True, "unknown"),
        ("sparkle_rank", 3, "unknown"),
    ],
)
def test_field_that_cannot_be_honoured_is_an_error(name: str, value: object, why: str) -> None:
    with pytest.raises(AdapterError, match=rf"(?s)a\.json.*{name} = {re.escape(repr(value))} \({why}\)"):
        LoraConfig.from_dict({"r": 4, "kasa_config": None, name: value}, source="a.json")
    with pytest.raises(TypeError, match=name):
        LoraConfig(**{name: value})


def test_every_field_that_cannot_be_honoured_is_named() -> None:
    with pytest.raises(AdapterError, match=r"(?s)kasa_config = True.*sparkles = 1"):
        LoraConfig.from_dict({"kasa_config": True, "sparkles": 1})


@pytest.mark.parametrize("value", [None, False, {}, [], 0, ""])
def test_unknown_field_that_is_off_is_harmless(value: object) -> None:
    assert LoraConfig.from_dict({"r": 4, "sparkles": value}) == LoraConfig(r=4)


@pytest.mark.parametrize("name", sorted(LoraConfig.unsupported))
def test_unsupported_field_that_is_off_is_harmless(name: str) -> None:
    for value in (LoraConfig.unsupported[name], None):
        assert LoraConfig.from_dict({"r": 4, name: value}) == LoraConfig(r=4)


CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "targets": {"r": 4, "lora_alpha": 12, "target_modules": ["v_proj", "q_proj"], "exclude_modules": "layers.0.*"},
    "regex": {"r": 3, "lora_alpha": 7, "target_modules": r".*\.(q|v)_proj", "use_rslora": True, "bias": "lora_only"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, r"layers\.0\.v_proj": 5},
        "alpha_pattern": {"v_proj": 2}, "layers_to_transform": [0, 2], "layers_pattern": ["layers"],
    },
    "rest": {
        "target_modules": "all-linear", "modules_to_save": ["head"], "task_type": "SEQ_CLS", "lora_dropout": 0.1,
        "init_lora_weights": False, "lora_bias": True, "revision": "main", "base_model_name_or_path": "me/tiny",
        "inference_mode": True, "auto_mapping": {"base_model_class": "Layers", "parent_library": "here"},
        "bias": "all", "fan_in_fan_out": True, "layers_to_transform": None, "lora_alpha": 16,
    },
}  # fmt: skip


def normal(config: peft.LoraConfig | LoraConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig)}
    return {n: sorted(v) if isinstance(v, set | list) and n == "target_modules" else v for n, v in values.items()}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(values: dict[str, Any]) -> None:
    config = LoraConfig(**values)
    written = config.to_dict()
    assert written["peft_type"] == "LORA"
    assert LoraConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_config_that_peft_wrote_reads(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**values)
    theirs.save_pretrained(tmp_path)
    read = LoraConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
    # PEFT always writes inference_mode=True
    assert normal(read) == normal(LoraConfig(**{**values, "inference_mode": read.inference_mode}))


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_peft_reads_ours(values: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**values)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert normal(peft.LoraConfig.from_pretrained(tmp_path)) == normal(config)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.q_proj"])
@pytest.mark.parametrize("extra", [{"layers_to_transform": 1}, {"layers_to_transform": [0], "layers_pattern": "a"}])
def test_layers_with_a_string_target_are_refused(targets: str, extra: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=r"layers_to_transform .*string"):
        LoraConfig(target_modules=targets, **extra)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["k_proj", "proj", r"layers\.7\..*"])
def test_pattern_that_matches_no_site_is_refused(name: str, pattern: str) -> None:
    model = Layers()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], **{name: {pattern: 3}})  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=rf"{name}: {re.escape(repr(pattern))} matches none of .* 6 sites"):
        fxpeft.add_adapter(model, config)
    assert "_fxpeft" not in vars(model)


@pytest.mark.parametrize(
    ("values", "sites"),
    [
        ({"target_modules": ["q_proj"]}, ["0.q_proj", "1.q_proj", "2.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["1.q_proj"]),
        ({"target_modules": ["q_proj", "head"], "layers_to_transform": [0, 2]}, ["0.q_proj", "2.q_proj", "head"]),
        ({"target_modules": ["v_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}, ["2.v_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, ["0.q_proj", "2.q_proj"]),
        ({"target_modules": r".*2\.[qv]_proj", "exclude_modules": ["v_proj"]}, ["2.q_proj"]),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "v_proj"]}, ["head"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["0", "2"]}, ["1.q_proj"]),
    ],
)
def test_selection_is_pefts(values: dict[str, Any], sites: list[str]) -> None:
    model = Layers()
    fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=6, **values))
    adapted = [n.replace(".adapters.default", "") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert [n.removeprefix("body.layers.") for n in adapted] == sites
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=6, **values), Layers())
    assert [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")] == adapted


@pytest.mark.parametrize("extra", [{"layers_to_transform": [7]}, {"exclude_modules": ["q_proj"]}])
def test_nothing_left_says_why(extra: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=rf"(?s)no module.*left out.*1\.q_proj: .*{next(iter(extra))}"):
        fxpeft.add_adapter(Layers(), LoraConfig(target_modules=["q_proj"], **extra))


def test_config_is_copied_when_added() -> None:
    model, config = Layers(), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    fxpeft.add_adapter(model, config)
    assert config == LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
