"""Weighted combinations and conversions against PEFT's, and against the mathematics where PEFT is off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_versions import SCALINGS, needs
from tiny import conv_net, logits, randomise, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.transform.derived import _quantile

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGETS = {"a": ["q_proj", "down_proj", "v_proj"], "b": ["q_proj", "down_proj", "up_proj"]}
# equal ranks at every site, which element-wise rules need; scales differ
EQUAL = {
    "a": {"r": 4, "lora_alpha": 10, "target_modules": TARGETS["a"], "alpha_pattern": {"q_proj": 3}},
    "b": {"r": 4, "lora_alpha": 6, "target_modules": TARGETS["b"], "alpha_pattern": {r"layers\.1\..*": 2}},
}
# other ranks and scales everywhere
MIXED = {
    "a": {**EQUAL["a"], "rank_pattern": {"q_proj": 3, "v_proj": 6}},
    "b": {**EQUAL["b"], "r": 2, "rank_pattern": {"up_proj": 5}},
}
WEIGHTS = [0.7, -1.3]
Pair = tuple[peft.PeftModel, nn.Module]


def pair(configs: dict[str, dict[str, Any]], folder: Path, build: Callable[[], nn.Module] = tiny_llama) -> Pair:
    """The same adapters in PEFT and in fxpeft."""
    names = list(configs)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**configs[names[0]]), adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**configs[name]))
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(folder))
    model = build()
    for name in names:
        fxpeft.load_adapter(model, folder / name, name)
    return theirs, model


def blended(theirs: peft.PeftModel, **values: Any) -> Tensor:
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "c", **values)
    theirs.set_adapter("c")
    found = logits(theirs)
    theirs.set_adapter("a")
    theirs.delete_adapter("c")
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[peft.PeftModel, nn.Module, nn.Module]]:
    """For equal and for mixed ranks: PEFT's model, ours, and ours with slots."""
    found = {}
    for key, configs in (("equal", EQUAL), ("mixed", MIXED)):
        theirs, live = pair(configs, tmp_path_factory.mktemp(key))
        slots = copy.deepcopy(live)
        fxpeft.prepare_hotswap(slots, 16)
        found[key] = theirs, live, slots
    return found


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("mixed", {}),
    "svd 3": ("mixed", {"svd_rank": 3}),
    "svd clamped": ("mixed", {"svd_rank": 4, "svd_clamp": 0.9, "svd_full_matrices": False}),
    "cat": ("mixed", {}),
    "ties_svd": ("mixed", {"density": 0.4}),
    "ties_svd frequency": ("mixed", {"density": 0.4, "majority_sign_method": "frequency", "svd_rank": 5}),
    "dare_linear_svd": ("mixed", {"density": 0.6}),
    "dare_ties_svd": ("mixed", {"density": 0.6}),
    "magnitude_prune_svd": ("mixed", {"density": 0.3}),
    "linear": ("equal", {}),
    "ties": ("equal", {"density": 0.5}),
    "ties frequency": ("equal", {"density": 0.5, "majority_sign_method": "frequency"}),
    "dare_linear": ("equal", {"density": 0.7}),
    "dare_ties": ("equal", {"density": 0.7}),
    "magnitude_prune": ("equal", {"density": 0.6}),
    "ties all": ("equal", {"density": 1.0}),
}


@pytest.mark.parametrize("rule", RULES)
def test_combines_as_peft(rule: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live and in slots, and PEFT loads what is saved."""
    if "svd" in rule:
        needs(*SCALINGS)
    ranks, values = RULES[rule]
    values = {"combination_type": rule.split()[0], **values}
    theirs, *ours = models[ranks]
    # PEFT draws first values for its new adapter, then freezes it, then draws for dare
    monkeypatch.setattr(peft.tuners.lora.model, "_freeze_adapter", lambda *_: torch.manual_seed(5))
    wanted = blended(theirs, **values)
    assert float((wanted - logits(tiny_llama())).abs().max()) > 0.05
    for model in ours:
        torch.manual_seed(5)
        fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", **values)
        assert fxpeft.active_adapters(model) == ["c"]
        assert_close(logits(model), wanted)
        fxpeft.save_adapter(model, tmp_path, "c")
        fxpeft.delete_adapter(model, "c")
    again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert_close(logits(again), wanted)


@pytest.mark.parametrize("rule", ["svd", "cat", "ties_svd", "magnitude_prune_svd"])
def test_embeddings_and_conv1d_combine_as_peft(rule: str, tmp_path: Path) -> None:
    if "svd" in rule:
        needs(*SCALINGS)
    configs = {
        "a": {"r": 4, "lora_alpha": 10, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
        "b": {"r": 3, "lora_alpha": 6, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True},
    }
    theirs, model = pair(configs, tmp_path, tiny_gpt2)
    values = {"combination_type": rule} | ({} if rule in ("svd", "cat") else {"density": 0.5})
    wanted = blended(theirs, **values)
    fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", **values)
    assert_close(logits(model), wanted)
    assert float((wanted - logits(tiny_gpt2())).abs().max()) > 0.1


# --- the mathematics, where PEFT has none or another ---


def update(model: nn.Module, name: str, site: str) -> Tensor:
    """What an adapter adds to a weight: fold it, look, unfold."""
    module = model.get_submodule(site)
    before = module.weight.detach().clone()
    fxpeft.set_adapter(model, [])
    fxpeft.fold(model, name)
    delta = module.weight.detach() - before
    fxpeft.unfold(model)
    return delta


def low_rank(delta: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).view_as(delta)


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_and_svd_are_the_weighted_sum(rslora: bool, tmp_path: Path) -> None:
    """With rsLoRA too: PEFT keeps use_rslora, and its result is too large by the root of the rank."""
    configs = {name: {**config, "use_rslora": rslora} for name, config in MIXED.items()}
    theirs, model = pair(configs, tmp_path)
    fxpeft.set_scale(model, "b", 0.5)
    site = "model.layers.1.mlp.down_proj"
    exact = 0.7 * update(model, "a", site) - 1.3 * update(model, "b", site)
    for rule, rank, wanted in (("cat", None, exact), ("svd", 6, exact), ("svd", 2, low_rank(exact, 2))):
        name = f"{rule}{rank}"
        fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, name, rule, rank)
        assert_close(update(model, name, site), wanted)
        assert not fxpeft.adapter_config(model, name).use_rslora
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.65], "c", "cat")
    ratio = theirs.get_submodule(f"base_model.model.{site}").get_delta_weight("c").norm() / exact.norm()
    assert float(ratio) == pytest.approx(math.sqrt(11) if rslora else 1, rel=1e-4)


def test_what_only_one_adapter_has(tmp_path: Path) -> None:
    """lora_bias, a head, and layers that the first adapter leaves out: PEFT loses all three."""
    model = tiny_bert()
    configs = {
        "a": LoraConfig(r=2, lora_alpha=5, target_modules=["query"], layers_to_transform=[0]),
        "b": LoraConfig(
            r=3, lora_alpha=4, target_modules=["query", "output.dense"], lora_bias=True, modules_to_save=["classifier"]
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
    fxpeft.set_adapter(model, ["a", "b"])
    wanted = logits(model)
    fxpeft.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")
    assert_close(logits(model), wanted, terms=1)
    fxpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    assert_close(logits(theirs), wanted, terms=1)


CONVS = {"target_modules": ["line", "plane", "grouped", "space"]}


def test_convolutions_of_every_kind_combine() -> None:
    x = torch.randn(2, 3, 16)
    for rule, sites in (("cat", CONVS["target_modules"]), ("svd", ["line", "plane", "space"])):
        model = conv_net()
        for seed, (name, rank) in enumerate((("a", 4), ("b", 2))):
            fxpeft.add_adapter(model, LoraConfig(r=rank, lora_alpha=7, target_modules=sites), name)
            randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
        fxpeft.set_scale(model, "a", 0.5)
        fxpeft.set_scale(model, "b", -2)
        fxpeft.set_adapter(model, ["a", "b"])
        with torch.no_grad():
            wanted = model(x)
        fxpeft.set_scale(model, "a", 1)
        fxpeft.set_scale(model, "b", 1)
        fxpeft.add_weighted_adapter(model, ["a", "b"], [0.5, -2], "c", rule, svd_rank=6)
        with torch.no_grad():
            assert_close(model(x), wanted)


def test_more_ranks_than_a_layer_has_are_zero(tmp_path: Path) -> None:
    """PEFT fails: the singular values are fewer than svd_rank."""
    theirs, model = pair(MIXED, tmp_path)
    with pytest.raises(RuntimeError):
        theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "svd", svd_rank=40)
    site = "model.layers.0.self_attn.q_proj"
    exact = 0.7 * update(model, "a", site) - 1.3 * update(model, "b", site)
    fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", "svd", 40)
    assert_close(update(model, "c", site), exact)
    for rule in ("svd", "magnitude_prune_svd"):
        fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, rule, rule, 40, 1.0, density=1.0)
        assert_close(update(model, rule, site), exact)


def test_one_adapter_is_combined_as_asked(tmp_path: Path) -> None:
    _, model = pair(MIXED, tmp_path)
    site = "model.layers.0.self_attn.q_proj"
    exact = update(model, "a", site)
    fxpeft.add_weighted_adapter(model, ["a"], [-2.0], "minus", "linear")
    assert_close(update(model, "minus", site), -2 * exact)
    fxpeft.add_weighted_adapter(model, ["a"], [1.0], "small", "svd", 1)
    assert_close(update(model, "small", site), low_rank(exact, 1))
    fxpeft.add_weighted_adapter(model, ["a"], [1.0], "pruned", "magnitude_prune_svd", 32, density=0.25)
    kept = exact.abs() >= exact.abs().flatten().sort(descending=True).values[exact.numel() // 4 - 1]
    assert_close(update(model, "pruned", site), exact * kept)


def test_dare_draws_from_the_generator_that_is_given(tmp_path: Path) -> None:
    _, model = pair(EQUAL, tmp_path)
    for name, seed in (("c", 3), ("d", 3), ("e", 4)):
        generator = torch.Generator().manual_seed(seed)
        fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, name, "dare_linear", density=0.5, generator=generator)
    c, d, e = (list(fxpeft.adapter_state_dict(model, name).values()) for name in "cde")
    assert all(map(torch.equal, c, d))
    assert not any(map(torch.equal, c, e))


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    outputs = []
    pair(MIXED, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama()
        for name in MIXED:
            fxpeft.load_adapter(model, tmp_path / name, name)
        model.to(dtype)
        fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", "ties_svd", density=0.5)
        assert {t.dtype for t in fxpeft.adapter_state_dict(model).values()} == {dtype}
        outputs.append(logits(model).float())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=5e-2 * max(1.0, float(outputs[0].abs().max())))


def test_refused(tmp_path: Path) -> None:
    _, model = pair(MIXED, tmp_path)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora")
    for name in ("s", "t"):
        fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), name)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "biased")
    before = list(fxpeft.adapters.state.state_of(model).adapters)
    two = ["a", "b"]
    for names, weights, values, message in (
        (two, WEIGHTS, {"combination_type": "mean"}, "combination_type: expected one of svd, linear"),
        (two, [1.0], {}, "expected one finite number for each of 2 adapters"),
        (two, [1.0, math.nan], {}, "one finite number"),
        ([], [], {}, "each of 0 adapters"),
        (["a", "dora"], WEIGHTS, {}, "only LoRAs can be blended, found\n  dora: dora"),
        (["a", "x"], WEIGHTS, {}, "no adapter named 'x'"),
        (two, WEIGHTS, {"combination_type": "ties"}, "density: ties needs a number above 0"),
        (two, WEIGHTS, {"combination_type": "dare_ties_svd", "density": 0}, "above 0 and at most 1, found 0"),
        (two, WEIGHTS, {"combination_type": "linear"}, r"q_proj: linear needs equal ranks, found {'a': 3, 'b': 2}"),
        (two, WEIGHTS, {"svd_rank": 0}, "svd_rank: expected a positive"),
        (two, WEIGHTS, {"svd_clamp": 90}, "svd_clamp: expected a quantile"),
        (two, WEIGHTS, {"majority_sign_method": "mean"}, "majority_sign_method: expected one of total, frequency"),
        (["s", "t"], WEIGHTS, {}, "brings its own\n  lm_head: t"),
        (["biased"], [1.0], {"combination_type": "ties", "density": 0.5}, "lora_bias has no part in ties"),
    ):
        with pytest.raises(AdapterError, match=message):
            fxpeft.add_weighted_adapter(model, names, weights, "c", **values)
    with pytest.raises(AdapterError, match="there is an adapter named 'a' already"):
        fxpeft.add_weighted_adapter(model, two, WEIGHTS, "a")
    assert list(fxpeft.adapters.state.state_of(model).adapters) == before
    grouped = conv_net()
    for name in two:
        fxpeft.add_adapter(grouped, LoraConfig(r=2, target_modules=["grouped"]), name)
    with pytest.raises(AdapterError, match="grouped: the update of a grouped convolution mixes all groups"):
        fxpeft.add_weighted_adapter(grouped, two, WEIGHTS, "c", "svd")


def test_a_slot_that_is_too_small_refuses_and_keeps_the_old(tmp_path: Path) -> None:
    _, model = pair(MIXED, tmp_path)
    fxpeft.prepare_hotswap(model, 6)
    before = logits(model)
    with pytest.raises(AdapterError, match="is above max_rank 6"):
        fxpeft.add_weighted_adapter(model, ["a", "b", "a"], [*WEIGHTS, 1.0], "c", "cat")
    fxpeft.add_weighted_adapter(model, ["a", "b"], WEIGHTS, "c", "svd", 5)
    fxpeft.set_adapter(model, "b")
    assert torch.equal(logits(model), before)


def test_quantile_is_torchs() -> None:
    values = torch.randn(1001)
    for q in (0.0, 0.37, 0.9, 1.0):
        torch.testing.assert_close(_quantile(values, q), torch.quantile(values, q))
