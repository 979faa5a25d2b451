"""Starts from data (CorDA, LoRA-GA) and from the weight's least directions (MiCA), with PEFT's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from tiny import logits, randomise, tiny_gpt2, tiny_llama, token_ids

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = token_ids(1, 9)
TARGETS = {tiny_llama: ["q_proj", "v_proj", "down_proj"], tiny_gpt2: ["c_attn"]}
EXACT = torch.svd_lowrank


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low-rank decomposition draws: the same in both libraries, whatever was drawn before."""

    def seeded(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return EXACT(*args, **kwargs)

    monkeypatch.setattr(torch, "svd_lowrank", seeded)


def fields(build: Any, start: str, own: dict[str, Any]) -> dict[str, Any]:
    more = {f"{start}_config": own} if start != "mica" else {}
    return {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[build], "init_lora_weights": start, **more}


def of_peft(build: Any, start: str, own: dict[str, Any]) -> Any:
    values = fields(build, start, own)
    model = build()
    if start == "corda":
        config = peft.LoraConfig(**{**values, "corda_config": peft.tuners.lora.config.CordaConfig(**own)})
        preprocess_corda(model, config, lambda: model(IDS))
    elif start == "lora_ga":
        config = peft.LoraConfig(**{**values, "lora_ga_config": peft.LoraGAConfig(**own)})
        preprocess_loraga(model, config, lambda: steps(model))
    else:
        config = peft.LoraConfig(**values)
    return peft.get_peft_model(model, config).eval()


def steps(model: Any) -> None:
    torch.manual_seed(3)  # GPT-2 has dropout of its own
    for ids in (IDS, IDS.flip(1)):
        model(input_ids=ids, labels=ids).loss.backward()


def ours(build: Any, start: str, own: dict[str, Any]) -> Any:
    model = build()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**fields(build, start, own)))
    if start == "corda":
        fxpeft.initialize_corda(model, lambda: model(IDS))
    elif start == "lora_ga":
        fxpeft.initialize_lora_ga(model, lambda: steps(model))
    return model


CASES = [
    (tiny_llama, "mica", {}),
    (tiny_gpt2, "mica", {}),
    (tiny_llama, "corda", {}),
    (tiny_gpt2, "corda", {"corda_method": "kpm"}),
    (tiny_llama, "lora_ga", {}),
    (tiny_gpt2, "lora_ga", {"direction": "ArBr", "scale": "gd_scale"}),
    (tiny_llama, "lora_ga", {"direction": "A2rBr", "scale": "weight_svd"}),
    (tiny_llama, "lora_ga", {"scale": "unit", "stable_gamma": 4}),
]


@pytest.mark.parametrize(("build", "start", "own"), CASES)
def test_start_function_and_gradients_are_pefts(build: Any, start: str, own: dict[str, Any], tmp_path: Path) -> None:
    bare = logits(build(), IDS)
    peer, model = of_peft(build, start, own), ours(build, start, own)
    assert_close(logits(model, IDS), bare)
    for each in (peer, model):
        each.zero_grad()
        each(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {n.replace(".default", ""): p for n, p in peer.named_parameters() if "lora_" in n}
    held = fxpeft.adapter_state_dict(model)
    grads = {p.data_ptr(): p.grad for p in model.parameters()}
    assert held.keys() == theirs.keys()
    for key, tensor in held.items():
        size = float(theirs[key].abs().max()) + 0.01
        torch.testing.assert_close(tensor, theirs[key].detach(), rtol=0, atol=2e-3 * size)
        own_grad, grad = grads.get(tensor.data_ptr()), theirs[key].grad
        assert (own_grad is None) is (grad is None)
        if grad is not None:
            torch.testing.assert_close(own_grad, grad, rtol=0, atol=2e-3 * (float(grad.abs().max()) + 1e-3))
    # trained, then saved: PEFT and this library load it on the base as it is
    randomise((p for p in model.parameters() if p.requires_grad), seed=4)
    wanted = logits(model, IDS)
    assert (wanted - bare).abs().max() > 1e-3
    fxpeft.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again, IDS), wanted, rtol=1e-4, atol=1e-4)
    served = build()
    fxpeft.prepare_hotswap(served, 8)
    fxpeft.load_adapter(served, tmp_path)
    torch.testing.assert_close(logits(served, IDS), wanted, rtol=1e-4, atol=1e-4)
    fxpeft.remove(model)
    assert torch.equal(logits(model, IDS), bare)


def test_mica_of_embeddings_and_its_file(tmp_path: Path) -> None:
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "mica"}
    peer, model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config)).eval(), tiny_llama()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
    theirs = peft.get_peft_model_state_dict(peer)
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        assert_close(tensor.detach(), theirs[key])
    randomise((p for p in peer.parameters() if p.requires_grad), seed=6)
    peer.save_pretrained(str(tmp_path))
    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path, trainable=True)
    assert_close(logits(loaded), logits(peer))
    assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"lora_A"}
    assert fxpeft.adapter_config(loaded).init_lora_weights == "mica"


def test_a_file_without_the_start_is_told_of(tmp_path: Path) -> None:
    peer = of_peft(tiny_llama, "corda", {})
    randomise((p for p in peer.parameters() if p.requires_grad), seed=6)
    peer.save_pretrained(str(tmp_path))
    wanted, residual = logits(peer), peer.unload()
    with pytest.warns(UserWarning, match="init_lora_weights='corda' took its start off a base"):
        fxpeft.load_adapter(residual, tmp_path)
    assert_close(logits(residual), wanted)


def test_what_is_refused_is_named() -> None:
    for values, message in (
        (
            {"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}},
            "expected 'ipm' or 'kpm'",
        ),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "x"}}, "lora_ga_config.scale: expected one of"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}, "stable_gamma: expected a number"),
        ({"init_lora_weights": "mica", "use_dora": True}, "'mica' is not supported with use_dora"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.LoraConfig(target_modules=["q_proj"], **values)  # type: ignore[arg-type]
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**fields(tiny_llama, "corda", {})))
    before = {key: tensor.clone() for key, tensor in fxpeft.adapter_state_dict(model).items()}
    with pytest.raises(fxpeft.AdapterError, match=r"can't start from these data:\n.*it was not called"):
        fxpeft.initialize_corda(model, lambda: None)
    with pytest.raises(fxpeft.AdapterError, match="init_lora_weights='lora_ga', found 'corda'"):
        fxpeft.initialize_lora_ga(model, lambda: None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in fxpeft.adapter_state_dict(model).items())
    fxpeft.prepare_hotswap(model, 8)
    with pytest.raises(fxpeft.AdapterError, match="call release_hotswap"):
        fxpeft.initialize_corda(model, lambda: model(IDS))
