"""Conversions to a plain LoRA against PEFT's, and against the mathematics where PEFT has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from test_blend import MIXED, low_rank, pair, update
from tiny import conv_net, logits, randomise, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

import fxpeft
from fxpeft import AdaLoraConfig, AdapterError, IA3Config, LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


CONVERTED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "adalora": (
        tiny_llama,
        AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=9, target_modules=["q_proj", "up_proj"]),
    ),
    "rslora, patterns": (tiny_llama, LoraConfig(**MIXED["a"], use_rslora=True)),
    "embedding": (tiny_llama, LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "v_proj"])),
    "lora_bias, head": (
        tiny_bert,
        LoraConfig(r=3, lora_alpha=5, target_modules=["query", "output.dense"], lora_bias=True, task_type="SEQ_CLS",
                   bias="lora_only", rank_pattern={"query": 2}),
    ),
    "Conv1D": (tiny_gpt2, LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED.values(), ids=CONVERTED)
def test_converts_exactly(case: Any, tmp_path: Path) -> None:
    build, config = case
    model = build()
    fxpeft.add_adapter(model, config, "a")
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    if isinstance(config, AdaLoraConfig):  # ranks that the allocator took away
        for i, (key, value) in enumerate(fxpeft.adapter_state_dict(model).items()):
            if key.endswith("lora_E"):
                value[: i % 4] = 0
        site = "model.layers.1.mlp.up_proj"
        fxpeft.adapter_state_dict(model)[f"base_model.model.{site}.lora_E"].zero_()
    fxpeft.set_scale(model, "a", 1.5)
    wanted = logits(model)
    fxpeft.convert(model, "a", new_name="live")
    assert_close(logits(model), wanted)
    fxpeft.prepare_hotswap(model, 8, methods=("lora", "lora_bias", "adalora"))
    fxpeft.convert(model, "a")
    assert fxpeft.active_adapters(model) == ["a_lora"]
    assert_close(logits(model), wanted)
    found = fxpeft.adapter_config(model)
    assert (found.peft_type, found.use_rslora, found.task_type) == ("LORA", False, config.task_type)
    if isinstance(config, AdaLoraConfig):
        ranks = {k: len(v) for k, v in fxpeft.adapter_state_dict(model).items() if "lora_A" in k}
        assert ranks[f"base_model.model.{site}.lora_A.weight"] == 1
        assert sorted(ranks.values()) != [4] * len(ranks)
    fxpeft.save_adapter(model, tmp_path, "a_lora")
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    assert_close(logits(theirs), wanted)


def test_a_gain_needs_fold_or_a_rank(tmp_path: Path) -> None:
    model = tiny_bert()
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["query"], use_dora=True), "dora")
    randomise((t for k, t in fxpeft.adapter_state_dict(model).items() if "magnitude" not in k), 1, scale=0.1)
    fxpeft.add_adapter(model, IA3Config(target_modules=["key"], feedforward_modules=[]), "ia3")
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    for name, site in (("dora", "query"), ("ia3", "key")):
        before = list(fxpeft.adapters.state.state_of(model).adapters)
        with pytest.raises(AdapterError, match=rf"{site}: the method multiplies.*fold takes it exactly"):
            fxpeft.convert(model, name)
        assert list(fxpeft.adapters.state.state_of(model).adapters) == before
        fxpeft.set_adapter(model, name)
        wanted, path = logits(model), f"bert.encoder.layer.1.attention.self.{site}"
        exact = update(model, name, path)
        with pytest.warns(UserWarning, match=rf"'{name}_lora' approximates '{name}' at rank 4: .*off by up to"):
            fxpeft.convert(model, name, rank=4)
        assert_close(update(model, f"{name}_lora", path), low_rank(exact, 4), terms=1)
        fxpeft.convert(model, name, new_name=f"{name}_full", rank=99)  # as many as the layer has: exact
        assert_close(logits(model), wanted)
        fxpeft.save_adapter(model, tmp_path / name)
        assert_close(logits(peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path / name)).eval()), wanted)


def test_a_lora_made_smaller_is_the_nearest(tmp_path: Path) -> None:
    _, model = pair(MIXED, tmp_path)
    site = "model.layers.0.self_attn.v_proj"
    exact = update(model, "a", site)
    with pytest.warns(UserWarning, match="off by up to"):
        fxpeft.convert(model, "a", new_name="small", rank=2)
    assert_close(update(model, "small", site), low_rank(exact, 2), terms=1)


def test_conversions_that_are_refused() -> None:
    model = conv_net()
    fxpeft.add_adapter(model, LoraConfig(r=4, target_modules=["grouped", "line"], use_rslora=True), "a")
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        wanted = model(x)
        for values, message in (
            ({"rank": 2}, "grouped: the update of a grouped convolution"),
            ({"rank": 0}, "rank: expected a positive"),
            ({"to": "dora"}, "to: expected 'lora'"),
            ({"new_name": "a"}, "there is an adapter named 'a'"),
        ):
            with pytest.raises(AdapterError, match=message):
                fxpeft.convert(model, "a", **values)
        fxpeft.convert(model, "a")
        assert_close(model(x), wanted)
