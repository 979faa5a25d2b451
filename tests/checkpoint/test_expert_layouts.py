"""Experts that were modules before Transformers 5: files with a LoRA for each, configs that name their projections."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from closeness import assert_close
from families import DECODER, FAMILIES, MOE
from peer_versions import EXPERTS, since
from safetensors.torch import save_file
from tiny import logits, randomise
from torch import Tensor

import fxpeft

PREFIX = "base_model.model."


def _made(cls: type, config: type, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return cls(config(**{**DECODER, **MOE, **fields})).eval()

    return build


@dataclass(frozen=True)
class Experts:
    """A family's experts as Transformers 4 named them, and where they are now."""

    build: Callable[[], Any]
    before: str
    now: str
    layers: tuple[int, ...]
    branches: tuple[str, str, str]  # gate, up, down
    dense: tuple[str, ...] = ()  # modules of the same names that are no experts'


MODELS = {
    "mixtral": Experts(
        FAMILIES["mixtral"].build, "block_sparse_moe.experts", "mlp.experts", (0, 1), ("w1", "w3", "w2")
    ),
    "qwen3 moe": Experts(
        FAMILIES["qwen3 moe"].build, "mlp.experts", "mlp.experts", (1,), ("gate_proj", "up_proj", "down_proj"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    ),
}  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: other tables of Transformers, which PEFT doesn't follow or not for all modules of these names
OTHERS = {
    "shared experts": Experts(
        _made(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig, num_experts=3, moe_intermediate_size=20,
              shared_expert_intermediate_size=28),
        "mlp.experts", "mlp.experts", (0, 1), PROJECTIONS,
        tuple(f"model.layers.{layer}.mlp.shared_expert.{name}" for layer in (0, 1) for name in PROJECTIONS),
    ),
    "jamba": Experts(
        _made(tf.JambaForCausalLM, tf.JambaConfig, num_experts=3, use_mamba_kernels=False, attn_layer_period=2,
              attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
        "feed_forward.experts", "feed_forward.experts", (1,), PROJECTIONS,
        tuple(f"model.layers.0.feed_forward.{name}" for name in PROJECTIONS),
    ),
    "deepseek": Experts(
        _made(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, n_routed_experts=4, n_group=2, topk_group=1,
              moe_intermediate_size=20, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=12, qk_rope_head_dim=4,
              qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1),
        "mlp.experts", "mlp.experts", (1,), PROJECTIONS,
        tuple(f"model.layers.{place}.{name}" for place in ("0.mlp", "1.mlp.shared_experts") for name in PROJECTIONS),
    ),
}  # fmt: skip
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 7}


def loads_and_saves(folder: Path, experts: Experts, expected: Tensor) -> None:
    """A file gives these outputs, and so does what is saved of it, in ``again``."""
    model = experts.build()
    fxpeft.load_adapter(model, folder)
    assert_close(logits(model), expected)
    fxpeft.save_adapter(model, folder / "again")
    again = experts.build()
    fxpeft.load_adapter(again, folder / "again")
    assert_close(logits(again), expected)


def own(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def write(
    folder: Path,
    experts: Experts,
    *,
    which: Any = lambda name: True,
    extra: tuple[str, ...] = (),
    attention: str = "q_proj",
    **fields: Any,
) -> Tensor:
    """A file as PEFT wrote it on Transformers 4; returns what it computes, from the base's weights themselves.

    Args:
        which: says of an expert's projection whether it has an adapter. extra: more modules that have one.
        attention: the end of names of others that do.
    """
    config = {**SETTINGS, "target_modules": [attention, *experts.branches], "peft_type": "LORA", **fields}
    config.setdefault("task_type", "CAUSAL_LM")
    generator, tensors, model = torch.Generator().manual_seed(6), {}, experts.build()
    weights = dict(model.named_parameters())

    def add(name: str, weight: Tensor) -> None:
        rank = own(config.get("rank_pattern", {}), name, config["r"])
        alpha = own(config.get("alpha_pattern", {}), name, config["lora_alpha"])
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
        weight += alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * b @ a

    with torch.no_grad():
        for name in (*(n for n, _ in model.named_modules() if n.endswith(attention)), *extra):
            add(name, weights[f"{name}.weight"])
        for layer in experts.layers:
            place = f"model.layers.{layer}.{experts.now}"
            gate, down = weights[f"{place}.gate_up_proj"], weights[f"{place}.down_proj"]
            half = gate.shape[1] // 2
            for e in range(len(gate)):
                parts = (gate[e, :half], gate[e, half:], down[e])
                for branch, weight in zip(experts.branches, parts, strict=True):
                    name = f"model.layers.{layer}.{experts.before}.{e}.{branch}"
                    if which(name):
                        add(name, weight)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return logits(model)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks and alphas": {"rank_pattern": {"up_proj|w3": 5, r".*experts\.1\..*": 2}, "alpha_pattern": {"w3|up_proj": 4}},
    "ranks by layer": {"rank_pattern": {r"model\.layers\.1\..*": 4}},
    "one projection": {"which": lambda name: name.endswith(("w1", "gate_proj"))},
    "some experts": {"which": lambda name: ".experts.1." not in name},
    "trained with dropout": {"lora_dropout": 0.1},
    "regular expression": {"target_modules": r".*(q_proj|experts\.\d+\.\w+)"},
}
#: what PEFT 0.21 computes too; of the others it reads none to the same outputs
PEFT_TOO = ("plain",)


@since(*EXPERTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_one_lora_for_each_expert(name: str, case: str, tmp_path: Path, installed: None) -> None:
    experts = MODELS[name]
    expected = write(tmp_path, experts, **CASES[case])
    assert not torch.allclose(expected, logits(experts.build()), atol=1e-2)
    if case in PEFT_TOO:
        theirs = peft.PeftModel.from_pretrained(experts.build(), tmp_path).eval()
        assert_close(logits(theirs), expected)
    native = experts.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxpeft.load_adapter(native, tmp_path)
    assert_close(logits(native), expected)
    through = experts.build()
    info = through.load_adapter(str(tmp_path))
    assert info.missing_keys == info.unexpected_keys == set()
    assert_close(logits(through), expected)
    # saved again it has the layout of now, which PEFT reads too
    fxpeft.save_adapter(native, tmp_path / "again")
    again = experts.build()
    fxpeft.load_adapter(again, tmp_path / "again")
    assert_close(logits(again), expected)
    theirs = peft.PeftModel.from_pretrained(experts.build(), tmp_path / "again").eval()
    assert_close(logits(theirs), expected)


def test_dense_layers_of_the_same_names(tmp_path: Path) -> None:
    """A file of Transformers 4 has them too, and PEFT drops them."""
    experts = MODELS["qwen3 moe"]
    expected = write(tmp_path, experts, extra=experts.dense)
    loads_and_saves(tmp_path, experts, expected)


@pytest.mark.parametrize("dense", [False, True], ids=["experts", "and dense modules"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, dense: bool, tmp_path: Path) -> None:
    experts = OTHERS[name]
    attention = "kv_b_proj" if name == "deepseek" else "q_proj"
    expected = write(tmp_path, experts, extra=experts.dense if dense else (), attention=attention)
    assert not torch.allclose(expected, logits(experts.build()), atol=1e-2)
    loads_and_saves(tmp_path, experts, expected)


def test_the_router(tmp_path: Path) -> None:
    experts = MODELS["mixtral"]
    routers = tuple(f"model.layers.{layer}.mlp.gate" for layer in experts.layers)
    expected = write(tmp_path, experts, extra=routers, target_modules=["q_proj", "gate", *experts.branches])
    model = experts.build()
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_swapped_into_slots(name: str, tmp_path: Path) -> None:
    experts = MODELS[name]
    expected = {case: write(tmp_path / case, experts, **CASES[case]) for case in ("plain", "ranks and alphas")}
    model = experts.build()
    # the projections' old names declare what a file that names them needs
    fxpeft.prepare_hotswap(model, max_rank=8, targets=["q_proj", *experts.branches])
    fxpeft.load_adapter(model, tmp_path / "plain")
    for case in ("ranks and alphas", "plain"):
        fxpeft.hotswap(model, tmp_path / case)
        assert_close(logits(model), expected[case])


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path, installed: None) -> None:
    experts = MODELS["mixtral"]
    write(tmp_path, experts)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"w3": 4}}))
    for load in (lambda m: fxpeft.load_adapter(m, tmp_path), lambda m: m.load_adapter(str(tmp_path))):
        model = experts.build()
        with pytest.raises(
            fxpeft.CheckpointError,
            match=r"experts\.0\.w3\.lora_A\.weight: expected \[4, 32\] for one of the 3 experts that "
            r"model\.layers\.0\.mlp\.experts\.gate_up_proj holds, found \[3, 32\]",
        ):
            load(model)
        assert not any("adapters" in n for n, _ in model.named_modules())


# --- item 19: a new adapter that names the projections ---


@since(*EXPERTS)
@pytest.mark.filterwarnings("ignore:target_modules names projections")
@pytest.mark.parametrize("form", ["list", "expression"])
@pytest.mark.parametrize("way", ["native", "transformers"])
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_is_pefts(name: str, way: str, form: str, tmp_path: Path, installed: None) -> None:
    experts = MODELS[name]
    targets: Any = ["q_proj", *experts.branches]
    if form == "expression":
        targets = rf".*\.({'|'.join(targets)})"
    settings = {**SETTINGS, "target_modules": targets, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(experts.build(), peft.LoraConfig(**settings))
    model = experts.build()
    if way == "native":
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**settings))
    else:
        model.add_adapter(peft.LoraConfig(**settings))
    shapes = {key: value.shape for key, value in peft.get_peft_model_state_dict(theirs).items()}
    assert {key: value.shape for key, value in fxpeft.adapter_state_dict(model).items()} == shapes
    randomise(fxpeft.adapter_state_dict(model).values(), seed=3)
    assert not torch.allclose(logits(model), logits(experts.build()), atol=1e-2)
    fxpeft.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(experts.build(), tmp_path).eval()
    assert_close(logits(loaded), logits(model))


@since(*EXPERTS)
@pytest.mark.parametrize("parameters", [r".*layers\.1\.mlp\.gate\.weight", ["layers.1.mlp.gate.weight"]])
def test_parameters_that_are_named_beside_them(parameters: Any) -> None:
    experts = MODELS["mixtral"]
    settings = {**SETTINGS, "target_modules": ["q_proj", "w2", "w1", "w3"], "rank_pattern": {"gate_up_proj": 5}}
    model = experts.build()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_parameters=parameters, **settings))
    found = {key: list(value.shape) for key, value in fxpeft.adapter_state_dict(model).items()}
    theirs = peft.get_peft_model(
        experts.build(), peft.LoraConfig(target_parameters=["layers.1.mlp.gate.weight"], **settings)
    )
    assert found == {key: list(value.shape) for key, value in peft.get_peft_model_state_dict(theirs).items()}
    assert found[f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight"] == [3 * 5, 32]  # the user's rank
    assert found[f"{PREFIX}model.layers.1.mlp.gate.lora_A.weight"] == [3, 32]


def test_dense_modules_that_are_left_out_are_named() -> None:
    experts = MODELS["qwen3 moe"]
    with pytest.warns(UserWarning, match=r"left out, as PEFT does:\n  model\.layers\.0\.mlp\.down_proj"):
        fxpeft.add_adapter(experts.build(), fxpeft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    # an expression that names no expert takes the dense ones, as before
    model = experts.build()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=r".*layers\.0\.mlp\.down_proj"))
    assert {key.rpartition(".lora")[0] for key in fxpeft.adapter_state_dict(model)} == {PREFIX + experts.dense[0]}


def test_half_of_what_one_parameter_holds_is_refused() -> None:
    model = MODELS["mixtral"].build()
    with pytest.raises(fxpeft.AdapterError, match=r"w1 without w3: .*layers\.0\.mlp\.experts\.gate_up_proj, so name"):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["q_proj", "w1"]))
    with pytest.raises(fxpeft.AdapterError, match="IA3 takes modules alone"):
        fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["k_proj", "w2"], feedforward_modules=["w2"]))
    with pytest.raises(fxpeft.AdapterError, match="can't have lora_dropout"):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["w2"], lora_dropout=0.1))
    assert not any("adapters" in n for n, _ in model.named_modules())
