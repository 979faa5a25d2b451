"""Adapters from tensors in memory: sites and ranks read off the keys, onto bases and as adapters without memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_versions import LORA_ONLY, needs
from tiny import conv_net, logits, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, CheckpointError, IA3Config, LoraConfig

IDS = token_ids()


@torch.no_grad()
def output(model: Any) -> Tensor:
    if not hasattr(model, "config"):
        found: Tensor = model(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)))
        return found
    return logits(model)


# name -> model, PEFT's config
CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "plain": (tiny_llama, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])),
    "ranks": (
        tiny_llama,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", rank_pattern={"0.mlp.up_proj": 5, "k_proj": 2}),
    ),
    "one layer": (tiny_llama, peft.LoraConfig(r=4, lora_alpha=5, target_modules=r".*\.1\.self_attn\.[qv]_proj")),
    "dora": (tiny_llama, peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["v_proj", "up_proj"])),
    "embedding and bias": (
        tiny_gpt2, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["wte", "c_attn"], bias="lora_only"),
    ),
    "all biases": (tiny_gpt2, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_fc"], bias="all")),
    "lora_bias": (tiny_llama, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"], lora_bias=True)),
    "head": (
        tiny_bert, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query"], modules_to_save=["classifier"]),
    ),
    "convolutions": (
        conv_net, peft.LoraConfig(r=4, lora_alpha=5, target_modules=["line", "grouped"], rank_pattern={"line": 3}),
    ),
    "ia3": (tiny_llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}  # fmt: skip


def trained(case: str) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model with random values in the adapter, and what it would save."""
    make, config = CASES[case]
    if config.peft_type == "LORA" and config.bias == "lora_only":
        needs(*LORA_ONLY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer: Any = peft.get_peft_model(make(), copy.deepcopy(config)).eval()
    own = (p for n, p in peer.named_parameters() if p.requires_grad or "lora_" in n)
    randomise(own, seed=3)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "ia3" in name or "magnitude" in name:
                parameter.add_(1)
    return peer, peft.get_peft_model_state_dict(peer)


def scaled_to_one(peer: Any) -> Any:
    for layer in (m for m in peer.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        layer.scaling["default"] = 1.0
    return peer


def in_memory(peer: Any) -> dict[str, Tensor]:
    """Keys of PEFT's modules, with the adapter's name, below a compiled model."""
    own = {n: p for n, p in peer.named_parameters() if p.requires_grad or "lora_" in n}
    return {n.replace("base_model.model.", "base_model.model._orig_mod."): p.detach() for n, p in own.items()}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


@pytest.mark.parametrize("keys", ["file", "without prefix", "in memory"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_alone(case: str, keys: str, tmp_path: Path) -> None:
    """Every site and rank, at scale 1: no tensor says alpha. PEFT's model at scale 1 is the reference."""
    peer, tensors = trained(case)
    if keys == "in memory":
        if "bias" in case and "lora" not in case:
            pytest.skip("PEFT's modules hold such a bias under the base's own name")
        tensors = in_memory(peer)
    model = CASES[case][0]()
    fxpeft.inject(model, without_prefix(tensors) if keys == "without prefix" else tensors)
    wanted = output(scaled_to_one(peer))
    assert_close(output(model), wanted)
    assert (wanted - output(CASES[case][0]())).abs().max() > 1e-3
    fxpeft.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(CASES[case][0](), str(tmp_path)).eval()
    assert_close(output(again), wanted)


@pytest.mark.parametrize("case", CASES)
def test_with_a_config_of_which_sites_and_ranks_are_not_used(case: str) -> None:
    """As in PEFT, the keys say where; here also of which rank. Alpha is the config's."""
    peer, tensors = trained(case)
    if case == "ranks":  # alpha over each site's own rank
        tensors = {k: v for k, v in tensors.items() if "k_proj" not in k and "0.mlp.up" not in k}
    theirs = CASES[case][1]
    make = CASES[case][0]
    model = make()
    if case == "ia3":
        config: Any = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        config = LoraConfig(
            r=64, lora_alpha=5, use_dora=theirs.use_dora, lora_bias=theirs.lora_bias, bias=theirs.bias,
            rank_pattern={"none": 7}, target_modules=["gate_proj"] if make is tiny_llama else ["fc", "dense", "space"],
        )  # fmt: skip
        with pytest.warns(RuntimeWarning, match="only in the state_dict, and taken"):
            fxpeft.inject(make(), tensors, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxpeft.inject(model, tensors, config)
    if case == "ranks":
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                if "lora_B" in name and ("k_proj" in name or "0.mlp.up" in name):
                    parameter.zero_()
    assert_close(output(model), output(peer))
    if case != "ia3":
        assert fxpeft.adapter_config(model).lora_alpha == 5


def test_the_config_alone_is_short_and_exact() -> None:
    _, tensors = trained("ranks")
    config = fxpeft.infer_config(tensors, tiny_llama())
    assert config.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config.r, config.lora_alpha) == (3, 3)
    assert config.rank_pattern == config.alpha_pattern
    assert sorted(config.rank_pattern.values()) == [2, 2, 5]
    assert fxpeft.infer_config(tensors, lora_alpha=7).alpha_pattern == {}
    _, tensors = trained("one layer")
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    for model in (None, tiny_llama()):
        assert fxpeft.infer_config(tensors, model).target_modules == names
    nested = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.ModuleDict({"a": nn.Linear(3, 4)})})
    keys = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
    fxpeft.inject(nested, keys)
    assert fxpeft.adapter_config(nested).target_modules == "a"
    assert set(fxpeft.adapter_state_dict(nested)) == {f"base_model.model.{key}" for key in keys}


@pytest.mark.parametrize("case", ["ranks", "dora", "embedding and bias", "head"])
def test_an_empty_adapter_is_filled_later(case: str) -> None:
    """PEFT: ``inject_adapter_in_model(..., low_cpu_mem_usage=True)``, then ``set_peft_model_state_dict``."""
    peer, tensors = trained(case)
    model = CASES[case][0]()
    fxpeft.inject(model, tensors, empty=True, trainable=True)
    own = [p for n, p in model.named_parameters() if ".adapters." in f".{n}"]
    assert own
    assert all(p.is_meta and p.requires_grad for p in own)
    fxpeft.load_adapter_state_dict(model, tensors)
    assert not any(p.is_meta for p in model.parameters())
    assert_close(output(model), output(scaled_to_one(peer)))
    assert fxpeft.trainable_parameters(model, show=False).trainable == sum(p.numel() for p in own)


def test_an_empty_adapter_from_a_config(tmp_path: Path) -> None:
    _, tensors = trained("plain")
    model = tiny_llama(torch.bfloat16)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    fxpeft.inject(model, config=config, name="late", empty=True)
    with fxpeft.disabled(model):
        assert torch.equal(output(model), output(tiny_llama(torch.bfloat16)))
    fxpeft.load_adapter_state_dict(model, {k: v.bfloat16() for k, v in tensors.items()}, "late")
    fxpeft.save_adapter(tiny_llama_with(tensors), tmp_path)
    other = tiny_llama(torch.bfloat16)
    fxpeft.load_adapter(other, tmp_path)
    assert all(v.dtype == torch.float32 for v in fxpeft.adapter_state_dict(model).values())
    torch.testing.assert_close(output(model), output(other), rtol=0, atol=0.02)
    assert (output(model) - output(tiny_llama(torch.bfloat16))).abs().max() > 0.1


def tiny_llama_with(tensors: Mapping[str, Tensor]) -> Any:
    model = tiny_llama()
    fxpeft.inject(model, tensors, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    return model


@pytest.mark.parametrize("case", ["ranks", "dora", "embedding and bias", "head", "ia3"])
@pytest.mark.parametrize("how", ["inject", "load"])
def test_onto_a_base_without_memory(case: str, how: str, tmp_path: Path) -> None:
    """The values stay in memory, and the model runs once the base's come."""
    peer, tensors = trained(case)
    make = CASES[case][0]
    with torch.device("meta"):
        model = copy.deepcopy(make()).to("meta")
    if how == "inject":
        fxpeft.inject(model, tensors)
        scaled_to_one(peer)
    else:
        peer.save_pretrained(str(tmp_path))
        fxpeft.load_adapter(model, tmp_path)
    assert next(model.parameters()).is_meta
    missing, unexpected = model.load_state_dict(make().state_dict(), strict=False, assign=True)
    for name, buffer in make().named_buffers():  # those that no state_dict has
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    assert not unexpected
    assert all(".adapters." in f".{key}" for key in missing)
    assert_close(output(model.eval()), output(peer))


def test_new_values_keep_the_parameters_that_an_optimiser_holds() -> None:
    _, tensors = trained("plain")
    model = tiny_llama_with(tensors)
    fxpeft.set_scale(model, "default", 0.5)
    own = dict(model.named_parameters())
    doubled = {key: 2 * value for key, value in tensors.items()}
    fxpeft.load_adapter_state_dict(model, doubled)
    assert all(p is own[n] for n, p in model.named_parameters())
    other = tiny_llama_with(doubled)
    fxpeft.set_scale(other, "default", 0.5)
    assert torch.equal(output(model), output(other))


def test_new_values_are_a_swap_on_a_prepared_model() -> None:
    _, tensors = trained("plain")
    doubled = {key: 2 * value for key, value in tensors.items()}
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "down_proj"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    with pytest.raises(AdapterError, match="empty: a slot needs values"):
        fxpeft.inject(model, tensors, config, empty=True)
    fxpeft.inject(model, tensors, config)
    assert_close(output(model), output(tiny_llama_with(tensors)))
    fxpeft.load_adapter_state_dict(model, doubled, "default")
    assert_close(output(model), output(tiny_llama_with(doubled)))


def wrong(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, key: value}


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Any, str]] = {
    "several": (
        lambda t: {k.replace("lora_A", f"lora_A.{n}").replace("lora_B", f"lora_B.{n}"): v
                   for n in "ab" for k, v in t.items()},
        "expected one adapter's tensors, found those of a, b",
    ),
    "same place": (wrong(f"{Q}.lora_A.default.weight", torch.ones(3, 32)), "two tensors have the place .*lora_A"),
    "no adapter": (lambda t: {"wte.weight": torch.ones(2)}, "no key is a LoRA's or an IA3's"),
    "the base's": (wrong(f"{Q}.base_layer.weight", torch.ones(32, 32)), "found the base's too"),
    "no A": (lambda t: {k: v for k, v in t.items() if "lora_A" not in k}, "but no lora_A, whose rows are its rank"),
    "no B": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "places in the model that the file"),
    "no module": (wrong(f"{Q}x.lora_A.weight", torch.ones(3, 32)), "LlamaForCausalLM has no such modules"),
    "a prompt": (lambda t: {"prompt_embeddings": torch.ones(3, 32)}, "a prompt's tensor doesn't say which method"),
    "adalora": (wrong(f"{Q}.lora_E", torch.ones(3, 1)), "AdaLoRA's schedule and ranks are not in its tensors"),
    "two methods": (wrong(f"{Q}.ia3_l", torch.ones(32, 1)), "of two methods"),
    "parameters": (
        wrong("model.layers.0.mlp.experts.base_layer.lora_A.weight", torch.ones(3, 32)), "target_parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_keys_do_not_say_is_refused(case: str) -> None:
    change, message = REFUSED[case]
    _, tensors = trained("plain")
    model = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        fxpeft.inject(model, change(dict(tensors)))
    assert not any("adapters" in n for n, _ in model.named_modules())
    assert torch.equal(output(model), output(tiny_llama()))


def test_other_refusals() -> None:
    _, tensors = trained("plain")
    model = tiny_llama()
    with pytest.raises(AdapterError, match="expected a state_dict or a config"):
        fxpeft.inject(model)
    with pytest.raises(AdapterError, match="target_parameters: their sites and ranks"):
        fxpeft.inject(model, tensors, LoraConfig(target_modules=[], target_parameters=["up_proj.weight"]))
    fxpeft.inject(model, tensors)
    before = output(model)
    with pytest.raises(CheckpointError, match="places in the model that the file doesn't fill"):
        fxpeft.load_adapter_state_dict(model, dict(list(tensors.items())[:3]))
    with pytest.raises(AdapterError, match="no adapter named 'b'"):
        fxpeft.load_adapter_state_dict(model, tensors, "b")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        fxpeft.load_adapter_state_dict(model, {k: v / 0 for k, v in tensors.items()}, check_finite=True)
    assert torch.equal(output(model), before)
    fxpeft.fold(model)
    with pytest.raises(AdapterError, match="its values can't be replaced; unfold the model first"):
        fxpeft.load_adapter_state_dict(model, tensors, "default")
