"""The commands that read adapters, on one of each method: what they say is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import add
from commands import run, told
from method_cases import METHODS
from prompt_cases import CONFIGS, prompted
from tiny import tiny_llama

import fxpeft
from fxpeft.checkpoint import read

TARGETS = ["q_proj", "down_proj"]
WHOLE = 48  # as many ranks as a layer has
PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern", "feedforward_modules")  # which name other modules
OWN = {
    "C3A": {"block_size": 8},
    "MiSS with `bat`": {"r": 4},
    "VB-LoRA": {"vector_length": 4},
    "GraLoRA": {"r": 4, "gralora_k": 2},
    "BOFT": {"boft_block_size": 4},
    "RoAd": {"group_size": 8},
}
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        name: (case.ours, {**{k: v for k, v in case.settings.items() if k not in PATTERNS}, **OWN.get(name, {})})
        for name, case in METHODS.items()
    },
    "PiSSA": (fxpeft.LoraConfig, {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}),
    "BD-LoRA": (fxpeft.LoraConfig, {
        "r": 4,
        "use_bdlora": fxpeft.BdLoraConfig(
            nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"]
        ),
    }),
    "aLoRA": (fxpeft.LoraConfig, {"r": 3, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().double() for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "down_proj.weight"))
    }


def folded(adapter: Path) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    fxpeft.load_adapter(model, adapter)
    return weights(fxpeft.merge_and_unload(model))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method(name: str, base: Path, tmp_path: Path) -> None:
    made, settings = SETTINGS[name]
    for seed, adapter in enumerate(("one", "other")):
        model = tiny_llama()
        add(model, made(target_modules=TARGETS, base_model_name_or_path=str(base), **settings), seed=seed)
        fxpeft.save_adapter(model, tmp_path / adapter)
    seen = told("inspect", tmp_path / "one")
    by_site = name != "UniLoRA"  # whose file has one vector, and names no site
    assert not by_site or [site["name"] for site in seen["site"]] == sorted(
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    )
    assert seen["finite"]
    fits = told("check", tmp_path / "one", "--model", base, "--max-rank", WHOLE)
    assert fits == {"loads": True, "swaps": True, "why_not": None, "sites": 4}
    assert told("diff", tmp_path / "one", tmp_path / "one")["changed"] == []
    found = told("diff", tmp_path / "one", tmp_path / "other", code=1)
    assert len(found["changed"]) == 4 if by_site else found["rest"]
    if name == "LoKr":  # at no ranks
        tight = run("check", tmp_path / "one", "--model", base, "--max-rank", 2)
        assert "swaps: yes\nprepared with lokr_factor=2" in tight
    if name == "aLoRA":
        return
    converted = told("convert", tmp_path / "one", tmp_path / "lora", "--to", "lora", "--rank", 5)
    assert len(converted["errors"]) == 4
    if name in ("BEFT", "LoRA with `lora_bias`"):  # exact; the base has no bias that theirs could be folded into
        assert converted["worst_error"] < 1e-6
        return
    before, whole, near = weights(tiny_llama()), folded(tmp_path / "one"), folded(tmp_path / "lora")
    for key, weight in whole.items():
        error = float((near[key] - weight).norm() / (weight - before[key]).norm())
        assert converted["errors"][key.removesuffix(".weight")] == pytest.approx(error, abs=1e-4), key
    if name in ("LoRA", "rsLoRA", "BD-LoRA"):
        for site in seen["site"]:
            own = f"{site['name']}.weight"
            assert site["norm"] == pytest.approx(float((whole[own] - before[own]).norm()), rel=1e-4)


def test_what_engines_get_states_what_it_misses(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, fxpeft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS, base_model_name_or_path=str(base)))
    fxpeft.save_adapter(model, tmp_path / "dora")
    made = told("convert", tmp_path / "dora", tmp_path / "near", "--for", "vllm", "--rank", 5)
    assert made["worst_error"] > 0.01
    assert set(made["errors"]) == {site["name"] for site in told("inspect", tmp_path / "near")["site"]}
    fxpeft.remove(model)
    add(model, fxpeft.BeftConfig(target_modules=["q_proj"], base_model_name_or_path=str(base)))
    fxpeft.save_adapter(model, tmp_path / "beft")
    with pytest.raises(fxpeft.AdapterError, match=r"beft: vllm can't take it:\n.*q_proj: lora_B_bias"):
        told("convert", tmp_path / "beft", tmp_path / "no", "--for", "vllm")
    assert not (tmp_path / "no").exists()


def test_repeated_layers(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    layers = [[0, 2], [1, 2]]
    fxpeft.replicate_layers(model, layers)
    config = fxpeft.LoraConfig(
        r=3, target_modules=TARGETS, layer_replication=layers, use_rslora=True, base_model_name_or_path=str(base)
    )
    add(model, config)
    fxpeft.save_adapter(model, tmp_path / "deep")
    checked = told("check", tmp_path / "deep", "--model", base)
    assert (checked["loads"], checked["swaps"], checked["sites"]) == (True, True, 6)
    assert told("convert", tmp_path / "deep", tmp_path / "lora", "--to", "lora")["parameters"]
    assert read(tmp_path / "lora").config.layer_replication == layers
    with pytest.warns(UserWarning, match="vllm repeats no layers"):
        told("convert", tmp_path / "deep", tmp_path / "vllm", "--for", "vllm")
    assert read(tmp_path / "vllm").config.layer_replication is None


@pytest.mark.parametrize("name", [*CONFIGS, "norms", "rows"])
def test_what_has_no_sites(name: str, base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    if name in CONFIGS:
        prompted(name, model)
    else:
        add(model, {"norms": fxpeft.LNTuningConfig(), "rows": fxpeft.TrainableTokensConfig(token_indices=[4])}[name])
    fxpeft.save_adapter(model, tmp_path / "one")
    assert told("inspect", tmp_path / "one")["other"]
    checked = told("check", tmp_path / "one", "--model", base)
    assert (checked["loads"], checked["swaps"], checked["why_not"]) == (True, True, None)
    assert not told("diff", tmp_path / "one", tmp_path / "one")["rest"]
    with pytest.raises(fxpeft.AdapterError, match="no LoRA does"):
        told("convert", tmp_path / "one", tmp_path / "lora", "--to", "lora", "--model", base)
