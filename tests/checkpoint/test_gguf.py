"""LoRAs as GGUF, read by gguf's own reader: names, metadata, and the update that llama.cpp computes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from adapter_files import save
from closeness import assert_close
from tiny import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import fxpeft
from fxpeft.checkpoint import Checkpoint, read
from fxpeft.checkpoint.adapter_file import site_scale, site_tensors
from fxpeft.checkpoint.gguf_file import ARCHITECTURES, REFUSED, TEXT, write_gguf
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


#: what llama.cpp's converters order by pairs, by their ``permute``
PAIRS = {
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Ministral3ForCausalLM", "SmolLM3ForCausalLM",
    "ArceeForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "OlmoForCausalLM",
    "Mistral3ForConditionalGeneration",
}  # fmt: skip
#: modules by their last names, or the last two -> what llama.cpp calls them
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate_up_proj": "ffn_up", "fc1": "ffn_up",
    "fc2": "ffn_down", "c_fc": "ffn_up", "c_attn": "attn_qkv", "dense": "attn_output", "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down", "w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down", "wg": "ffn_gate_inp",
    "shared_expert_gate": "ffn_gate_inp", "attn.c_proj": "attn_output", "mlp.c_proj": "ffn_down",
    "self_attn.out_proj": "attn_output", "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
}  # fmt: skip
TYPES = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl", "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl", "Gemma3ForConditionalGeneration": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral3", "Gemma3ForCausalLM": "gemma3_text",
}  # fmt: skip


def empty_of(named: str) -> Any:
    """A model of an architecture, its language model tiny, on the meta device."""
    found = next((kind for kind, own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if own == named), "")
    kind, sizes = TYPES.get(named, found), {**SIZES, "pad_token_id": 0}
    if kind == "falcon":
        del sizes["head_dim"]
    elif kind == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"]
    config = CONFIG_MAPPING[kind](**{"text_config": sizes} if "Conditional" in named else sizes)
    config.architectures = [named]
    with torch.device("meta"):
        return getattr(transformers, named)(config)


@pytest.mark.parametrize("named", ARCHITECTURES)
def test_every_architecture(named: str, tmp_path: Path) -> None:
    model, known = empty_of(named), ARCHITECTURES[named]
    text = TEXT if "Conditional" in named else ""
    wanted = {
        name: module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(text) and name != "lm_head"
    }
    wanted = {name: shape for name, shape in wanted.items() if name.rpartition(".")[2] not in known.left}
    own = {f"base_model.model.{name}.lora_A.weight": torch.randn(2, into) for name, (into, _) in wanted.items()}
    own |= {f"base_model.model.{name}.lora_B.weight": torch.randn(out, 2) for name, (_, out) in wanted.items()}
    found = Checkpoint("here", fxpeft.LoraConfig(r=2, lora_alpha=2), own)
    write_gguf(tmp_path / "a.gguf", found, model.config)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert value(reader, "general.architecture") == known.name
    held = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    expected, heads = dict[str, Tensor](), {"q_proj": 4, "k_proj": 2}
    for site, factors in site_tensors(found)[0].items():
        parts = site.split(".")
        name = NAMES.get(".".join(parts[-2:])) or NAMES[parts[-1]]
        layer, end = next(part for part in parts if part.isdigit()), "_shexp" if "shared" in site else ""
        b = factors["lora_B"]
        if named in PAIRS and parts[-1] in heads:
            b = by_pairs(b, heads[parts[-1]])
        name = f"blk.{layer}.{name}{end}.weight"
        expected |= {f"{name}.lora_a": factors["lora_A"], f"{name}.lora_b": b}
    assert len(expected) == 2 * len(wanted)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    for last, why in known.left.items():
        bad = {f"base_model.model.model.layers.0.{last}.lora_{x}.weight": torch.randn(3, 3) for x in "AB"}
        with pytest.raises(fxpeft.AdapterError, match=why):
            write_gguf(tmp_path / "b.gguf", Checkpoint("here", found.config, bad), model.config)


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (tiny_bert, ["query"], "GGUF: expected a base of LlamaForCausalLM.*found 'BertForSequenceClassification'"),
        (tiny_gpt2, ["wpe", "c_attn"], "(?s)no place for\n  transformer.wpe: gpt2 has no update of it\n"),
        (gemma, ["embed_tokens", "q_proj"], "(?s)no place for\n.*embed_tokens: llama.cpp has it with other rows"),
    ],
)
def test_what_has_no_place_is_named(build: Any, targets: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        converted(build, fxpeft.LoraConfig(r=2, target_modules=targets), tmp_path)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_more_than_renamed_is_refused_with_the_reason(named: str, tmp_path: Path) -> None:
    base = LlamaConfig(architectures=[named])
    with pytest.raises(fxpeft.AdapterError, match=f"GGUF: {named}: {REFUSED[named]}"):
        write_gguf(tmp_path / "a.gguf", Checkpoint("here", fxpeft.LoraConfig(), {}), base)
