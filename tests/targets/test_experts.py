"""``target_parameters``: patterns, plans, what is refused and where, and what else happens to such a model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from adapter_files import add
from closeness import assert_close
from families import DECODER, MOE, mixtral
from tiny import logits, randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS, **fields})


def adapted(**fields: Any) -> Any:
    model = mixtral()
    add(model, config(**fields))
    return model


# --- which ---


def sites(model: Any, wanted: Any, **fields: Any) -> list[str]:
    return [site.name for site in fxpeft.plan(model, config(target_parameters=wanted, **fields)).sites]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["down_proj"], ["0.mlp.experts.down_proj", "1.mlp.experts.down_proj"]),
        (["model.layers.1.mlp.experts.down_proj", "nothing"], ["1.mlp.experts.down_proj"]),
        (r".*\.1\..*(up|down)_proj", ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
        ("role:experts & layers[-1] & name:**.down_proj", ["1.mlp.experts.down_proj"]),
        (
            ["name:**.gate_up_proj & layers[0]", "1.mlp.gate.weight"],
            ["0.mlp.experts.gate_up_proj", "1.mlp.gate.weight"],
        ),
    ],
)  # fmt: skip
def test_names_and_patterns(wanted: Any, found: list[str], tmp_path: Path) -> None:
    model = mixtral()
    assert sites(model, wanted) == [f"model.layers.{name}" for name in found]
    fxpeft.add_adapter(model, config(target_parameters=wanted))
    fxpeft.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert isinstance(written, list)
    assert sites(model, written) == [f"model.layers.{name}" for name in found]


def test_patterns_as_keys() -> None:
    plan = fxpeft.plan(
        mixtral(), config(rank_pattern={"role:experts & layers[0]": 7}, alpha_pattern={"name:**.down_proj": 2})
    )
    found = {site.name.removeprefix("model.layers."): (site.rank, site.alpha) for site in plan.sites}
    assert found == {
        "0.mlp.experts.gate_up_proj": (7, 5), "0.mlp.experts.down_proj": (7, 2),
        "1.mlp.experts.gate_up_proj": (3, 5), "1.mlp.experts.down_proj": (3, 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["gate_up_projs"], r"target_parameters=\['gate_up_projs'\]; nearest names: gate_up_proj, down_proj"),
        ("role:expert", r"target_parameters='role:expert' selects nothing:\n.*nearest: experts"),
        ("(", "target_parameters: .* is no regular expression"),
        (["experts."], "no parameter of the model is named by"),
        (7, "target_parameters: expected"),
    ],
)
def test_what_selects_nothing(wanted: Any, message: str) -> None:
    model = mixtral()
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, config(target_parameters=wanted))
    assert fxpeft.trainable_parameters(model, show=False).trainable == sum(p.numel() for p in model.parameters())


def test_without_target_modules_the_architectures_own_are_taken() -> None:
    assert len(sites(mixtral(), EXPERTS, target_modules=None)) == 8  # PEFT's table: q_proj and v_proj too
    torch.manual_seed(0)
    other = tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**DECODER, num_experts=3, moe_intermediate_size=20, head_dim=8, **MOE)
    )
    assert len(sites(other, EXPERTS, target_modules=None)) == 4  # which PEFT's table lacks


def test_plan_counts_and_keeps(tmp_path: Path) -> None:
    model = mixtral()
    with torch.device("meta"):
        empty = tf.MixtralForCausalLM(model.config)
    plan = fxpeft.plan(empty, config(rank_pattern={"down_proj": 2}))
    up, down = plan.sites[0], plan.sites[1]
    assert (up.kind, up.role, up.in_features, up.out_features, up.rank) == ("parameter[3]", "experts", 32, 96, 3)
    assert (down.in_features, down.out_features, down.rank, down.flops) == (48, 32, 2, 0)
    assert (up.parameters, down.parameters) == (3 * 3 * (32 + 96), 2 * 3 * (48 + 32))
    assert not any(skip.site.endswith("experts") for skip in plan.skipped)
    again = fxpeft.Plan.from_json(plan.to_json())
    assert again == plan
    fxpeft.apply(again, model)
    assert fxpeft.trainable_parameters(model, show=False).trainable == plan.parameters


# --- what is refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 0.1), ("lora_bias", True), ("use_dora", True), ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "orthogonal"), ("init_lora_weights", "eva"),
    ],
)  # fmt: skip
def test_what_an_update_of_a_parameter_cannot_have(field: str, value: object) -> None:
    with pytest.raises(AdapterError, match=rf"target_parameters: .* can't have {field}={value!r}"):
        config(**{field: value})


def test_other_methods_have_no_target_parameters() -> None:
    with pytest.raises(AdapterError, match="target_parameters: has no effect with AdaLoRA"):
        fxpeft.AdaLoraConfig(total_step=10, target_parameters=EXPERTS)
    with pytest.raises(TypeError, match="target_parameters"):
        fxpeft.IA3Config(target_parameters=EXPERTS)


class Odd(nn.Module):
    """Modules whose parameters can't be given to their forward, or are no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.norm = nn.LayerNorm(4)
        self.lstm = nn.LSTM(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.dense = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("wanted", "fields", "message"),
    [
        (["scale"], {}, "scale: it is a parameter of the model itself"),
        (["norm.weight"], {}, r"norm.weight: expected a floating-point parameter .* a Parameter of float32 \[4\]"),
        (["weight_hh_l0"], {}, "lstm.weight_hh_l0: LSTM reads its weights from a list"),
        (["out_proj.weight"], {}, "attention.out_proj.weight: nn.MultiheadAttention reads it without calling"),
        (["dense.weight"], {"target_modules": ["dense"]}, "dense.weight: it is a target"),
        (["dense.weight"], {"modules_to_save": ["dense"]}, "dense.weight: it is a target"),
        (["dense.weight"], {"bias": "all"}, "dense.weight: it is a target, or brings a bias"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_updated(wanted: list[str], fields: dict[str, Any], message: str) -> None:
    model = Odd()
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, config(target_parameters=wanted, **fields))
    assert "_fxpeft" not in vars(model)


def test_a_module_and_its_parameter_take_turns() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), "whole")
    fxpeft.add_adapter(model, config(target_parameters=["v_proj.weight"]), "weight")
    randomise(fxpeft.adapter_state_dict(model, "weight").values())
    alone = logits(model)
    with pytest.raises(AdapterError, match=r"v_proj: it is a target, .* leave one out"):
        fxpeft.set_adapter(model, ["whole", "weight"])
    assert fxpeft.active_adapters(model) == ["weight"]
    assert torch.equal(logits(model), alone)
    with pytest.raises(AdapterError, match=r"v_proj: it is a target, .* leave one out"):
        fxpeft.prepare_hotswap(model, 8)
    assert torch.equal(logits(model), alone)
    with pytest.raises(AdapterError, match=r"q_proj.weight: it is a target"):
        fxpeft.prepare_hotswap(tiny_llama(), 8, target_parameters=["q_proj.weight"])


def test_slots_say_what_is_missing(tmp_path: Path) -> None:
    model = adapted()
    fxpeft.save_adapter(model, tmp_path)
    model = mixtral()
    fxpeft.prepare_hotswap(model, 8)
    with pytest.raises(AdapterError, match=r"experts.down_proj: has no slot; declare it in .*target_parameters"):
        fxpeft.load_adapter(model, tmp_path)
    fxpeft.release_hotswap(model)
    fxpeft.prepare_hotswap(model, 2, targets=["q_proj"], target_parameters=EXPERTS)
    with pytest.raises(AdapterError, match=r"experts.down_proj: rank 3 is above max_rank 2"):
        fxpeft.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(mixtral()))


def test_a_swap_that_fails_leaves_the_old_adapter(tmp_path: Path) -> None:
    model = adapted()
    fxpeft.prepare_hotswap(model, 8)
    before, good = logits(model), {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}
    key = next(k for k in good if ".base_layer.lora_B" in k)
    for wrong, message in (
        ({**good, key: good[key][:, 1:]}, rf"(?s){key.removeprefix('base_model.model.')}: expected \[96, 9\], found"),
        ({k: v for k, v in good.items() if k != key}, "(?s)the file doesn't fill"),
        ({**good, key: good[key] * torch.nan}, "expected finite values"),
    ):
        with pytest.raises(AdapterError, match=message):
            fxpeft.hotswap(model, wrong, check_finite=True)
        assert torch.equal(logits(model), before)
    fxpeft.hotswap(model, {k: -v if "lora_B" in k else v for k, v in good.items()})
    assert float((logits(model) - before).abs().max()) > 1e-2
    fxpeft.hotswap(model, good)
    assert torch.equal(logits(model), before)


def test_blends_conversions_and_programs_want_modules(tmp_path: Path) -> None:
    model = adapted()
    fxpeft.save_adapter(model, tmp_path)
    for call in (
        lambda: fxpeft.add_weighted_adapter(model, ["default"], [1.0], "sum"),
        lambda: fxpeft.convert(model, "default", rank=1),
    ):
        with pytest.raises(AdapterError, match=r"(?s)default: model.layers.0.mlp.experts.gate_up_proj\n.*fold them"):
            call()
    with pytest.raises(AdapterError, match=r"target_parameters=.*a package has slots at modules only"):
        fxpeft.package(mixtral(), tmp_path / "m.pt2", (token_ids(),), targets=config())
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(AdapterError, match=r"target_parameters=.*a program or package has no modules whose parameters"):
        fxpeft.rewrite(graph, config(target_modules=["0"], target_parameters=["0.weight"]))
    with pytest.raises(AdapterError, match=r"target_parameters=.*a program or package has no modules whose parameters"):
        fxpeft.rewrite(graph, tmp_path)


def test_files_are_inspected_and_not_shrunk(tmp_path: Path) -> None:
    from fxpeft.checkpoint import read
    from fxpeft.checkpoint.adapter_file import diff_files, inspect_sites, shrink

    fxpeft.save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    found = read(tmp_path)
    rows = {site.name.removeprefix("model.layers.0."): site for site in inspect_sites(found)}
    assert rows["self_attn.q_proj"].rank == 3
    assert rows["self_attn.q_proj"].norm
    up = rows["mlp.experts.base_layer"]
    assert (up.rank, up.norm, up.shapes["lora_A"]) == (0, None, [9, 32])
    assert not diff_files(found, found)
    changed = copy.deepcopy(found)
    changed.tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"] += 1
    assert [change.name for change in diff_files(found, changed).changed] == ["model.layers.1.mlp.experts"]
    with pytest.raises(AdapterError, match=r"mlp.experts.* it updates a parameter"):
        shrink(found, 2)


# --- what else happens to a model ---


@pytest.mark.parametrize("prepared", [False, True], ids=["training", "slots"])
def test_copies_pickles_casts_and_loads(prepared: bool, tmp_path: Path) -> None:
    model = adapted()
    wanted = logits(model)
    if prepared:
        fxpeft.prepare_hotswap(model, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(other), wanted)
        fxpeft.disable_adapters(other)
        assert_close(logits(other), logits(mixtral()))
        assert_close(logits(model), wanted)
    torch.save(model, tmp_path / "model.pt")
    assert_close(logits(torch.load(tmp_path / "model.pt", weights_only=False)), wanted)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    # two products rounded to bfloat16 and their sum, where the sum of the weights is rounded once and so its product
    assert float((logits(half).float() - wanted).abs().max()) < (0.05 if prepared else 0.08) * float(wanted.abs().max())
    other = mixtral()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    model.load_state_dict(other.state_dict(), strict=False)  # the base's own names are the bare model's
    fxpeft.remove(model)
    assert torch.equal(logits(model), logits(other))


def test_offloaded_experts(tmp_path: Path) -> None:
    fxpeft.save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    wanted = logits(adapted(target_modules=["q_proj"]))
    model = accelerate.cpu_offload(mixtral(), execution_device="cpu")
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model), wanted)
    with pytest.raises(AdapterError, match=r"experts.gate_up_proj: .*offloaded"):
        fxpeft.fold(model)
    fxpeft.prepare_hotswap(model, 8)
    assert_close(logits(model), wanted)
    fxpeft.remove(model)
    assert torch.equal(logits(model), logits(mixtral()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert_close(gradients[1][name], gradient, terms=1)


def test_the_base_is_updated_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many experts the loop visits, where the forward reads slots; in training never."""
    model = adapted()
    model.set_experts_implementation("eager")
    calls: list[torch.Size] = []
    original: Callable[..., Tensor] = torch.baddbmm

    def counted(weight: Tensor, *args: Tensor) -> Tensor:
        calls.append(weight.shape)
        return original(weight, *args)

    monkeypatch.setattr(torch, "baddbmm", counted)
    logits(model)
    assert not calls
    fxpeft.prepare_hotswap(model, 8)
    logits(model)
    assert len(calls) == 4  # two parameters in each of two layers


def test_folding_refuses_what_would_overflow() -> None:
    model = adapted()
    model.to(torch.float16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fxpeft.set_scale(model, "default", 1e6)
    with pytest.raises(AdapterError, match=r"(?s)NaN or infinity in\n.*experts\.gate_up_proj"):
        fxpeft.fold(model, safe=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "scaling" not in k)


def test_refolds_swap_experts() -> None:
    model = adapted()
    outputs = {"default": logits(model)}
    fxpeft.add_adapter(model, config(r=2, target_parameters=EXPERTS[:1]), "other")
    randomise(fxpeft.adapter_state_dict(model).values(), seed=3)
    outputs["other"] = logits(model)
    for name in ("default", "other", "default"):
        fxpeft.refold(model, name)
        assert_close(logits(model), outputs[name])
    fxpeft.refold(model, [])
    assert torch.equal(logits(model), logits(mixtral()))
