"""LoRAs as GGUF, read by gguf's own reader: names, metadata, and the update that llama.cpp computes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from adapter_files import save
from closeness import assert_close
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

import fxpeft
from fxpeft.checkpoint import read
from fxpeft.checkpoint.adapter_file import site_scale, site_tensors
from fxpeft.tools.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def qwen() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def gemma() -> Any:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()


def converted(build: Any, config: Any, folder: Path, *options: str) -> gguf.GGUFReader:
    build().save_pretrained(folder / "base")
    save(build(), config, folder / "adapter", seed=3)
    command = ["convert", str(folder / "adapter"), str(folder / "a.gguf"), "--for", "llama.cpp", *options]
    found = CliRunner().invoke(app, [*command, "--model", str(folder / "base")], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return gguf.GGUFReader(folder / "a.gguf")


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def by_pairs(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter of Llama's weights orders the rows of q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("build", [tiny_llama, qwen])
def test_what_llama_cpp_adds_is_the_update(build: Any, tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    if build is qwen:
        targets = targets[:-1]
    config = fxpeft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, use_rslora=True, rank_pattern={"k_proj": 2}, task_type="CAUSAL_LM"
    )
    reader = converted(build, config, tmp_path)
    assert value(reader, "general.type") == "adapter"
    assert value(reader, "adapter.type") == "lora"
    assert value(reader, "general.architecture") == ("llama" if build is tiny_llama else "qwen2")
    alpha = value(reader, "adapter.lora.alpha")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    source = read(tmp_path / "adapter")
    sites = site_tensors(source)[0]
    assert len(held) == 2 * len(sites)
    for site, own in sites.items():
        last = site.rpartition(".")[2]
        layer = site.split(".")[2] if last in names else ""
        name = f"blk.{layer}.{names[last]}" if layer else {"embed_tokens": "token_embd", "lm_head": "output"}[last]
        a, b = held[f"{name}.weight.lora_a"], held[f"{name}.weight.lora_b"]
        added = b @ (a if last != "embed_tokens" else a.t()) * (alpha / b.shape[1])  # its scale, alpha over the rank
        wanted = own["lora_B"] @ own["lora_A"] * site_scale(source.config, site, len(own["lora_A"]))
        if build is tiny_llama and last in ("q_proj", "k_proj"):
            wanted = by_pairs(wanted, {"q_proj": 4, "k_proj": 2}[last])
        assert_close(added, wanted)
    halves = converted(build, config, tmp_path / "half", "--dtype", "float16")
    assert {t.tensor_type for t in halves.tensors} == {gguf.GGMLQuantizationType.F16}


def test_an_invocation_goes_along(tmp_path: Path) -> None:
    config = fxpeft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 3], task_type="CAUSAL_LM")
    assert value(converted(tiny_llama, config, tmp_path), "adapter.alora.invocation_tokens") == [7, 3]
    save_for = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "sglang"]
    with pytest.raises(fxpeft.AdapterError, match="it is alora, and only a plain LoRA"):
        CliRunner().invoke(app, save_for, catch_exceptions=False)


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (tiny_gpt2, ["c_attn"], "GGUF: expected a base of LlamaForCausalLM.*found 'GPT2LMHeadModel'"),
        (
            gemma,
            ["embed_tokens", "q_proj"],
            "(?s)no place for\n.*embed_tokens: llama.cpp has no such weight, or another",
        ),
    ],
)
def test_what_has_no_place_is_named(build: Any, targets: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        converted(build, fxpeft.LoraConfig(r=2, target_modules=targets), tmp_path)
    assert not (tmp_path / "a.gguf").exists()
