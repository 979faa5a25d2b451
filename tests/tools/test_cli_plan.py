"""``fxpeft plan --method``: each method that there is, by its name, with its sites and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import told
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.methods import METHODS, config_for, method_of

PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
#: what a method needs to be given
NEEDED: dict[str, dict[str, Any]] = {
    "alora": {"alora_invocation_tokens": [5, 7]}, "adalora": {"total_step": 9}, "prompt_tuning": PROMPT,
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}},
    "trainable_tokens": {"token_indices": [1, 2, 5]}, "p_tuning": PROMPT, "prefix_tuning": PROMPT,
    "multitask_prompt_tuning": {**PROMPT, "num_tasks": 3, "num_ranks": 2}, "cartridge": PROMPT,
    "cpt": {"cpt_token_ids": [1, 2, 5]},
}  # fmt: skip


def wide() -> LlamaForCausalLM:
    """One layer, wide enough for every method's defaults."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=256, intermediate_size=264, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_what_is_planned_is_what_an_adapter_has(method: str) -> None:
    model, given = wide(), config_for(method, NEEDED.get(method, {}))
    assert method_of(given).name == method
    made = fxpeft.plan(model, given, roles=False)
    fxpeft.apply(made, model)
    own = state_of(model).adapters["default"].values.flat().values()
    assert made.parameters == sum(tensor.numel() for tensor in own) > 0
    assert made.extra_bytes == sum(tensor.nbytes for tensor in own)
    assert fxpeft.Plan.from_json(made.to_json()) == made
    assert f"{made.parameters:,} parameters" in str(made)


def test_any_method_on_the_command_line(tmp_path: Path) -> None:
    wide().config.save_pretrained(tmp_path)
    for method, options, class_name in (
        ("ln_tuning", [], "LNTuningConfig"), ("vera", ["--rank", 5], "VeraConfig"),
        ("adalora", ["--rank", 6, "--alpha", 9, "--set", "total_step=9"], "AdaLoraConfig"),
        ("prefix_tuning", ["--set", "num_virtual_tokens=3", "--set", "task_type=CAUSAL_LM"], "PrefixTuningConfig"),
    ):  # fmt: skip
        seen = told("plan", tmp_path, "--method", method, *options)
        made = fxpeft.Plan.from_json(json.dumps(seen))
        assert type(made.config).__name__ == class_name
        given = config_for(method, NEEDED.get(method, {}), rank=options[1] if "--rank" in options else None)
        assert made.parameters == fxpeft.plan(wide(), given, roles=False).parameters
    assert (made.config.num_virtual_tokens, seen["config"]["task_type"]) == (3, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "doara"], r"method: expected one of dora, .*, found 'doara'; nearest: dora"),
        (["--method", "alora"], "alora: expected alora_invocation_tokens, found none"),
        (["--method", "ia3", "--rank", 3], "rank: ia3 has none; its fields are task_type, "),
        (["--method", "vera", "--alpha", 3], "alpha: vera has none"),
        (
            ["--method", "oft", "--set", "oft_blok_size=4"],
            "oft: it has no field 'oft_blok_size'; nearest: oft_block_size",
        ),
        (["--set", "use_dora=true"], "lora: .*use_dora: with these it is dora"),
        (["--set", "r"], "--set: expected FIELD=VALUE, found 'r'"),
        (["--set", "r=many"], "LoraConfig.r: expected int, found 'many'"),
    ],
)
def test_a_wrong_question(options: list[object], says: str, tmp_path: Path) -> None:
    with pytest.raises(fxpeft.AdapterError, match=says):
        told("plan", tmp_path, *options)
