"""Tiny models of many families, and a hand-written table of what each of their modules does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as t

LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 40, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 44,
}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

L, S = "model.layers.{0,1}", "self_attn"
LLAMA_ATTENTION = {
    f"{L}.{S}.q_proj": "attention.query", f"{L}.{S}.k_proj": "attention.key", f"{L}.{S}.v_proj": "attention.value",
    f"{L}.{S}.o_proj": "attention.output", "lm_head": "lm_head", "model.embed_tokens": "embedding.token",
}  # fmt: skip
LLAMA_ROLES = {
    **LLAMA_ATTENTION, f"{L}.mlp.gate_proj": "mlp.gate", f"{L}.mlp.up_proj": "mlp.up",
    f"{L}.mlp.down_proj": "mlp.down",
}  # fmt: skip
MOE_ROLES = {**LLAMA_ATTENTION, f"{L}.mlp.gate": "router", f"{L}.mlp.experts": "experts"}


def bert_roles(prefix: str) -> dict[str, str]:
    layer = f"{prefix}.encoder.layer.{{0,1}}"
    return {
        f"{layer}.attention.self.query": "attention.query", f"{layer}.attention.self.key": "attention.key",
        f"{layer}.attention.self.value": "attention.value", f"{layer}.attention.output.dense": "attention.output",
        f"{layer}.intermediate.dense": "mlp.up", f"{layer}.output.dense": "mlp.down",
        f"{prefix}.embeddings.word_embeddings": "embedding.token",
    }  # fmt: skip


def t5_roles(mlp: dict[str, str]) -> dict[str, str]:
    parts = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return {
        **{f"{{encoder,decoder}}.block.{{0,1}}.layer.0.SelfAttention.{p}": f"attention.{r}" for p, r in parts.items()},
        **{f"decoder.block.{{0,1}}.layer.1.EncDecAttention.{p}": f"cross_attention.{r}" for p, r in parts.items()},
        **{f"{where}.DenseReluDense.{p}": r for where in ("encoder.block.{0,1}.layer.1", "decoder.block.{0,1}.layer.2")
           for p, r in mlp.items()},
        "{encoder,decoder}.embed_tokens": "embedding.token", "lm_head": "lm_head",
    }  # fmt: skip


def bart_roles(head: str) -> dict[str, str]:
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    layers = "model.{encoder,decoder}.layers.{0,1}"
    return {
        **{f"{layers}.self_attn.{p}": f"attention.{r}" for p, r in parts.items()},
        **{f"model.decoder.layers.{{0,1}}.encoder_attn.{p}": f"cross_attention.{r}" for p, r in parts.items()},
        f"{layers}.fc1": "mlp.up", f"{layers}.fc2": "mlp.down", head: "lm_head",
    }  # fmt: skip


def tower_roles(layer: str, output: str) -> dict[str, str]:
    at = f"{layer}.{{0,1}}"
    attention = "attention" if output == "o_proj" else "self_attn"
    return {
        f"{at}.{attention}.q_proj": "attention.query", f"{at}.{attention}.k_proj": "attention.key",
        f"{at}.{attention}.v_proj": "attention.value", f"{at}.{attention}.{output}": "attention.output",
        f"{at}.mlp.fc1": "mlp.up", f"{at}.mlp.fc2": "mlp.down",
    }  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)), LLAMA_ROLES),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA)), LLAMA_ROLES),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=8)), LLAMA_ROLES),
    "gemma2": (lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**LLAMA, head_dim=8)), LLAMA_ROLES),
    "phi3": (
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**LLAMA)),
        {
            f"{L}.{S}.qkv_proj": "attention.qkv", f"{L}.{S}.o_proj": "attention.output",
            f"{L}.mlp.gate_up_proj": "mlp.gate_up", f"{L}.mlp.down_proj": "mlp.down", "lm_head": "lm_head",
            "model.embed_tokens": "embedding.token",
        },
    ),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_inner=36, n_positions=32, bos_token_id=1,
                         eos_token_id=2)
        ),
        {
            "transformer.h.{0,1}.attn.c_attn": "attention.qkv", "transformer.h.{0,1}.attn.c_proj": "attention.output",
            "transformer.h.{0,1}.mlp.c_fc": "mlp.up", "transformer.h.{0,1}.mlp.c_proj": "mlp.down",
            "lm_head": "lm_head", "transformer.wte": "embedding.token",
        },
    ),
    "gpt_neox": (
        lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**BERT, bos_token_id=1, eos_token_id=2)),
        {
            "gpt_neox.layers.{0,1}.attention.query_key_value": "attention.qkv",
            "gpt_neox.layers.{0,1}.attention.dense": "attention.output",
            "gpt_neox.layers.{0,1}.mlp.dense_h_to_4h": "mlp.up", "gpt_neox.layers.{0,1}.mlp.dense_4h_to_h": "mlp.down",
            "gpt_neox.embed_in": "embedding.token", "lm_head": "lm_head",
        },
    ),
    **{
        name: (
            make_model,
            {
                "transformer.h.{0,1}.self_attention.query_key_value": "attention.qkv",
                "transformer.h.{0,1}.self_attention.dense": "attention.output",
                "transformer.h.{0,1}.mlp.dense_h_to_4h": "mlp.up", "transformer.h.{0,1}.mlp.dense_4h_to_h": "mlp.down",
                "transformer.word_embeddings": "embedding.token", "lm_head": "lm_head",
            },
        )
        for name, make_model in {
            "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)),
            "falcon": lambda: t.FalconForCausalLM(
                t.FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
            ),
        }.items()
    },
    "opt": (
        lambda: t.OPTForCausalLM(
            t.OPTConfig(vocab_size=40, hidden_size=24, ffn_dim=36, word_embed_proj_dim=24, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)
        ),
        {
            **{f"model.decoder.layers.{{0,1}}.self_attn.{p}": f"attention.{r}" for p, r in
               {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}.items()},
            "model.decoder.layers.{0,1}.fc1": "mlp.up", "model.decoder.layers.{0,1}.fc2": "mlp.down",
            "model.decoder.embed_tokens": "embedding.token", "lm_head": "lm_head",
        },
    ),
    "bert": (
        lambda: t.BertForSequenceClassification(t.BertConfig(**BERT, num_labels=3)),
        {**bert_roles("bert"), "classifier": "head"},
    ),
    "roberta": (
        lambda: t.RobertaForMaskedLM(t.RobertaConfig(**BERT)),
        {**bert_roles("roberta"), "lm_head.decoder": "lm_head"},
    ),
    "t5": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), t5_roles({"wi": "mlp.up", "wo": "mlp.down"}),
    ),
    "t5_gated": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
        t5_roles({"wi_0": "mlp.gate", "wi_1": "mlp.up", "wo": "mlp.down"}),
    ),
    "bart": (
        lambda: t.BartForConditionalGeneration(t.BartConfig(**BART, max_position_embeddings=32, **SPECIAL)),
        {**bart_roles("lm_head"), "model.{encoder,decoder}.embed_tokens": "embedding.token"},
    ),
    "vit": (
        lambda: t.ViTForImageClassification(t.ViTConfig(**TOWER, **IMAGE)),
        {
            **tower_roles("vit.layers", "o_proj"), "classifier": "head",
            "vit.embeddings.patch_embeddings.projection": "embedding.patch",
        },
    ),
    "clip": (
        lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**TOWER, "vocab_size": 40, "max_position_embeddings": 16, **SPECIAL},
                vision_config={**TOWER, **IMAGE, "hidden_size": 28}, projection_dim=20,
            )
        ),
        {
            **tower_roles("{text,vision}_model.encoder.layers", "out_proj"), "{text,visual}_projection": "head",
            "text_model.embeddings.token_embedding": "embedding.token",
            "vision_model.embeddings.patch_embedding": "embedding.patch",
        },
    ),
    "llava": (
        lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=t.CLIPVisionConfig(**TOWER, **IMAGE), text_config=t.LlamaConfig(**LLAMA),
                          image_token_id=5)
        ),
        {
            **tower_roles("model.vision_tower.encoder.layers", "out_proj"),
            **{name.replace("model.", "model.language_model."): role for name, role in LLAMA_ROLES.items()},
            "model.vision_tower.embeddings.patch_embedding": "embedding.patch",
        },
    ),
    "mamba": (
        lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2)),
        {"backbone.embeddings": "embedding.token", "lm_head": "lm_head"},
    ),
    "deepseek_v3": (
        lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **{**LLAMA, "num_key_value_heads": 4}, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4,
                qk_nope_head_dim=4, v_head_dim=6, first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1,
                num_experts_per_tok=2, moe_intermediate_size=20,
            )
        ),
        {
            f"{L}.{S}.q_b_proj": "attention.query", f"{L}.{S}.kv_b_proj": "attention.kv",
            f"{L}.{S}.o_proj": "attention.output", "model.layers.1.mlp.gate": "router",
            "model.layers.1.mlp.experts": "experts", "lm_head": "lm_head", "model.embed_tokens": "embedding.token",
            **{f"model.layers.{where}.{p}_proj": f"mlp.{p}" for where in ("0.mlp", "1.mlp.shared_experts")
               for p in ("gate", "up", "down")},
        },
    ),
    "whisper": (
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(**BART, **SPECIAL, num_mel_bins=10, max_source_positions=12, max_target_positions=16)
        ),
        {**bart_roles("proj_out"), "model.decoder.embed_tokens": "embedding.token"},
    ),
    "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**LLAMA, num_local_experts=4)), MOE_ROLES),
    "qwen3_moe": (
        lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
        ),
        MOE_ROLES,
    ),
}  # fmt: skip


def make(family: str, attention: str | None = None) -> Any:
    """A model of a family, on random weights."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def roles_of(family: str) -> dict[str, str]:
    """The table of a family, its braces written out."""
    table: dict[str, str] = {}
    for glob, role in FAMILIES[family][1].items():
        pieces = re.split(r"\{([^}]*)\}", glob)
        choices = [piece.split(",") if at % 2 else [piece] for at, piece in enumerate(pieces)]
        table.update({"".join(parts): role for parts in itertools.product(*choices)})
    return table
