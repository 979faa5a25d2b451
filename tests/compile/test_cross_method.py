"""Adapters of different methods in one compiled graph."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from adapter_files import save_each
from closeness import assert_close
from tiny import tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft
from fxpeft import AdaLoraConfig, IA3Config, LoraConfig
from fxpeft.passes.live import forward_text

IDS = token_ids()
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 7}),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(init_r=5, lora_alpha=7, total_step=10, target_modules=["v_proj", "down_proj"]),
    "lora_bias": LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj"], lora_bias=True),
}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_each(tiny_llama, CONFIGS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def fresh(folders: dict[str, str]) -> dict[str, Tensor]:
    """Each adapter's output from a model of its own, and the bare model's."""
    outputs = {"off": output(tiny_llama())}
    for name, folder in folders.items():
        model = tiny_llama()
        fxpeft.load_adapter(model, folder)
        outputs[name] = output(model)
        assert (outputs[name] - outputs["off"]).abs().max() > 0.01
    return outputs


@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_every_method_in_one_graph(rank: Any, folders: dict[str, str], fresh: dict[str, Tensor]) -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=TARGETS, methods=tuple(CONFIGS), rank=rank)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    counter = CompileCounterWithBackend("eager" if rank == "static" else "inductor")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    output(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ["lora", "dora", "ia3", "adalora", "off", "lora", "ia3", "lora_bias", "dora", "lora"]:
            if name == "off":
                fxpeft.disable_adapters(model)
            else:
                fxpeft.enable_adapters(model)
                fxpeft.set_adapter(model, name)
            assert_close(output(compiled), fresh[name])
        fxpeft.hotswap(model, folders["dora"], "lora")  # another method under the same name
        assert_close(output(compiled), fresh["dora"])
        fxpeft.hotswap(model, folders["ia3"], "lora")
        assert_close(output(compiled), fresh["ia3"])
        assert isinstance(fxpeft.adapter_config(model), IA3Config)
    assert counter.frame_count == 1


def test_a_method_that_was_not_declared_is_refused(folders: dict[str, str], fresh: dict[str, Tensor]) -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=TARGETS)
    fxpeft.load_adapter(model, folders["lora"])
    for name in ("dora", "ia3", "adalora", "lora_bias"):
        with pytest.raises(fxpeft.AdapterError, match=rf"methods=\('lora', '{name}'\)"):
            fxpeft.load_adapter(model, folders[name], name)
        with pytest.raises(fxpeft.AdapterError, match="nothing was changed"):
            fxpeft.hotswap(model, folders[name])
    assert_close(output(model), fresh["lora"])


def test_only_declared_methods_leave_a_trace_in_the_graph() -> None:
    def text(*methods: str) -> str:
        model = tiny_llama()
        fxpeft.prepare_hotswap(model, 8, targets=TARGETS, methods=methods)
        return forward_text(model.model.layers[0].mlp.down_proj)

    lean = text("lora", "adalora")
    assert not re.search("g_in|g_out|shift", lean)
    assert re.search("g_in", text("lora", "ia3"))
    assert re.search("shift", text("dora"))
    assert not re.search("g_in", text("dora"))


def test_a_gain_cannot_share_a_slot(folders: dict[str, str], fresh: dict[str, Tensor]) -> None:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 12, targets=TARGETS, methods=tuple(CONFIGS))
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    with pytest.raises(fxpeft.AdapterError, match=r"v_proj: dora \(dora\) and adalora"):
        fxpeft.set_adapter(model, ["dora", "adalora"])
    assert_close(output(model), fresh["lora_bias"])  # the last one loaded
    fxpeft.set_adapter(model, ["lora", "adalora"])  # sums of ranks are fine
    both = output(model)
    fxpeft.release_hotswap(model)
    assert_close(output(model), both)


def test_a_gain_cannot_share_a_bias_that_another_adapter_brings() -> None:
    model = tiny_gpt2()
    for name, config in {
        "biases": LoraConfig(r=2, target_modules=["c_fc"], bias="all"),
        "dora": LoraConfig(r=2, target_modules=["c_attn"], use_dora=True),
    }.items():
        fxpeft.add_adapter(model, config, name)
    fxpeft.prepare_hotswap(model, 4, methods=("lora", "dora"))
    with pytest.raises(fxpeft.AdapterError, match=r"c_attn: dora \(dora\) and biases"):
        fxpeft.set_adapter(model, ["biases", "dora"])
    assert fxpeft.active_adapters(model) == ["dora"]


def test_scales(folders: dict[str, str]) -> None:
    for name in ("lora", "dora", "adalora"):
        trained, served = tiny_llama(), tiny_llama()
        fxpeft.load_adapter(trained, folders[name])
        fxpeft.prepare_hotswap(served, 8, targets=TARGETS, methods=tuple(CONFIGS))
        fxpeft.load_adapter(served, folders[name])
        full = output(served)
        for scale in (0.3, 1.0):
            fxpeft.set_scale(trained, "default", scale)
            fxpeft.set_scale(served, "default", scale)
            assert_close(output(served), output(trained))
            assert torch.equal(output(served), full) == (scale == 1)
    fxpeft.load_adapter(served, folders["ia3"], "gains")
    with pytest.raises(fxpeft.AdapterError, match="'gains': ia3 has no scale"):
        fxpeft.set_scale(served, "gains", 0.5)
