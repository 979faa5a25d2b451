"""Names are selected, and patterns read, exactly as PEFT does."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peer_versions import needs
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import fxpeft
from fxpeft.passes.targets.names import NameSelector, matches, pattern_value

NAMES = [
    "", "q_proj", "xq_proj", "model.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj",
    "model.layers.10.self_attn.q_proj", "layers.1.q_proj", "model.layers.1.self_attn.v_proj", "model.h.1.q_proj",
    "model.layers.1.experts.0.q_proj", "model.blocks.0.layers.1.q_proj", "h.2.q_proj", "model.layers.1.lm_head.q_proj",
    "lm_head", "lm_head.q_proj", "model.lm_head", "model.lm_head.q_proj", "model.xlm_head.q_proj", "model.layers.1",
    "model.q_proj.base", "model.layers.one.q_proj", "encoder.layer.1.q_proj",
]  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "suffix": {"target_modules": ["q_proj"]},
    "two suffixes": {"target_modules": ["q_proj", "self_attn.v_proj"]},
    "full name": {"target_modules": ["model.layers.0.q_proj", "lm_head"]},
    "regular expression": {"target_modules": r"model\.layers\.\d+\.(self_attn\.)?q_proj"},
    "expression of a part": {"target_modules": "q_proj"},
    "exclude some": {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj"]},
    "exclude by suffix": {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    "exclude expression": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "exclude, targets an expression": {"target_modules": ".*q_proj", "exclude_modules": ["lm_head.q_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layer zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 10]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "full name and a layer": {"target_modules": ["q_proj", "layers.1.q_proj"], "layers_to_transform": [0]},
    "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["h", "layer"]},
    "patterns, one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["blocks", "h"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "modules to save, expression": {"target_modules": ".*q_proj", "modules_to_save": ["lm_head", "model.h"]},
    "saved and excluded": {
        "target_modules": ["q_proj"], "modules_to_save": ["h"], "exclude_modules": ["lm_head.q_proj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_selects_what_peft_selects(case: str) -> None:
    if CONFIGS[case].get("layers_to_transform") not in (None, []):
        needs(21, "takes the last number of a name for the layer's, or misses one at its start")
    theirs = peft.LoraConfig(**CONFIGS[case])
    selector = fxpeft.LoraConfig(**CONFIGS[case]).selector()
    # PEFT answers with an excluded marker whose truth value is false
    wanted = [name for name in NAMES if check_target_module_exists(theirs, name)]
    assert selector.select(NAMES) == wanted
    assert [name for name in NAMES if selector(name)] == wanted
    assert len(wanted) < len(NAMES)
    assert bool(wanted) == (case != "exclude by suffix")


PATTERNS: list[dict[str, int]] = [
    {},
    {"q_proj": 2},
    {"layers.1.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "layers.1.q_proj": 2},
    {r"model\.layers\.\d+\..*q_proj": 4},
    {r"^q_proj": 5},
    {"proj": 6},
    {"q_proj|lm_head": 7},
    {"layers..0.q_proj": 8, "(v|q)_proj": 9},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_have_pefts_values(patterns: dict[str, int]) -> None:
    wanted = {name: patterns.get(get_pattern_key(patterns.keys(), name), 8) for name in NAMES}
    assert {name: pattern_value(patterns, name, 8) for name in NAMES} == wanted


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({}, "b", "matches no target"),
        ({"exclude": ["x.a"]}, "x.a", "matches exclude_modules"),
        ({"below": ["head"]}, "head.a", "lies in modules_to_save"),
        ({"layers": [1]}, "x.a", "has no layer index, and layers_to_transform asks for one"),
        ({"layers": [1]}, "m.layers.2.a", "layer 2 is not in layers_to_transform"),
        ({"layers": [1]}, "m.layers.1.a", None),
    ],
)
def test_says_why_not(settings: dict[str, Any], name: str, reason: str | None) -> None:
    assert NameSelector(["a"], **settings).why_not(name) == reason


def test_a_list_is_no_expression_and_a_string_is_no_suffix() -> None:
    assert not matches(["q.*"], "q_proj")
    assert matches("q.*", "q_proj")
    assert not matches("q_proj", "model.q_proj")
