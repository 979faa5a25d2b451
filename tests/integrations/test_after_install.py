"""What Transformers' callers rely on after ``install()``: its errors, its reports, its modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_versions import TRANSFORMERS, since
from tiny import logits, randomise, tiny_bert, tiny_llama
from torch import nn

import fxpeft

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}
IA3: dict[str, Any] = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    found = {}
    for seed, (name, config) in enumerate({"lora": fxpeft.LoraConfig(**LORA), "ia3": fxpeft.IA3Config(**IA3)}.items()):
        model = tiny_llama()
        model.add_adapter(config)
        randomise(model.get_adapter_state_dict().values(), seed)
        model.save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


def loaded(folder: str) -> Any:
    model = tiny_llama()
    model.load_adapter(folder)
    return model


def test_a_lora_does_not_replace_another_method_unasked(folders: dict[str, str]) -> None:
    model = loaded(folders["ia3"])
    before = logits(model)
    with pytest.raises(ValueError, match=r"only supported for LoRA, please set `hotswap=False`"):
        model.load_adapter(folders["lora"], "default", hotswap=True)
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].peft_type == "IA3"


@pytest.mark.parametrize("methods", [("ia3", "lora"), ("ia3",)])
def test_slots_that_were_declared_for_both_take_it(folders: dict[str, str], methods: tuple[str, ...]) -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, max_rank=8, targets=["q_proj", "k_proj", "down_proj"], methods=methods)
    model.load_adapter(folders["ia3"])
    if "lora" in methods:
        model.load_adapter(folders["lora"], "default", hotswap=True)
        assert_close(logits(model), logits(loaded(folders["lora"])))
        assert not torch.allclose(logits(model), logits(loaded(folders["ia3"])), atol=1e-2)
        return
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(folders["lora"], "default", hotswap=True)
    assert_close(logits(model), logits(loaded(folders["ia3"])))


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"]),
    "ia3": lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["query"]),
}


@since(*TRANSFORMERS)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_report_is_transformers_own(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that are missing, unexpected or of another shape, as PEFT behind the same call reports them."""
    config = CONFIGS[method]()
    tensors = peft.get_peft_model_state_dict(peft.get_peft_model(tiny_bert(), config))
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    first = [key for key in tensors if "layer.0" in key or "embeddings" in key or key.startswith("classifier")]
    gone = {key: tensors.pop(key) for key in first}
    if method == "lora":
        tensors["bert.encoder.layer.7.attention.self.query.lora_A.weight"] = torch.zeros(3, 24)
        tensors["bert.encoder.layer.1.attention.self.query.lora_B.weight"] = torch.zeros(5, 3)
    fxpeft.uninstall()
    theirs = tiny_bert().load_adapter(
        peft_config=CONFIGS[method](), adapter_state_dict=dict(tensors), adapter_name="own",
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    fxpeft.install()
    with caplog.at_level("WARNING", "transformers.integrations.peft"):
        mine = tiny_bert().load_adapter(
            peft_config=CONFIGS[method](), adapter_state_dict=dict(tensors), adapter_name="own",
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    assert gone
    # AdaLoRA's ranknum is in no file, so PEFT always misses it
    assert mine.missing_keys == {key for key in theirs.missing_keys if ".ranknum." not in key}
    assert mine.unexpected_keys == theirs.unexpected_keys
    assert mine.mismatched_keys == theirs.mismatched_keys
    assert "MISSING" in caplog.text
    assert {record.name for record in caplog.records} == {"transformers.integrations.peft"}


def modes(model: Any) -> set[bool]:
    return {m.training for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "adapters" in n}


@pytest.mark.parametrize("way", ["load", "swap", "add"])
def test_what_is_trained_has_its_dropout_on(way: str, tmp_path: Path) -> None:
    config = fxpeft.LoraConfig(**LORA, lora_dropout=0.5)
    source = tiny_llama()
    source.add_adapter(config)
    randomise(source.get_adapter_state_dict().values(), 4)
    source.save_pretrained(tmp_path)
    model = source if way == "add" else tiny_llama()
    if way != "add":
        model.load_adapter(str(tmp_path), is_trainable=way == "load")
    if way == "swap":
        assert modes(model) == {False}
        model.load_adapter(str(tmp_path), "default", hotswap=True, is_trainable=True)
    assert not model.training  # the base stays as it is
    assert modes(model) == {True}
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.load_adapter(str(tmp_path), "frozen")
    assert torch.equal(logits(model), logits(model))
