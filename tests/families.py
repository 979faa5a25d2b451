"""One tiny random model of each of many architectures, its inputs and the modules that adapters go to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from tiny import VOCABULARY, randomise, token_ids
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build a model, what to call it with (labels included where it takes them), and its targets.

    ``other`` are targets of a second adapter to swap to. ``parameters``: ``target_parameters`` of the first; the
    second has the last of them.
    """

    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    targets: list[str]
    other: list[str]
    parameters: tuple[str, ...] = ()


# nowhere square: query width 32, key width 16, inner width 48
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 3,
    "initializer_range": 0.2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}


def mixtral(**fields: Any) -> Any:
    """Two layers of three experts."""
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=3, **MOE, **fields)).eval()


def text() -> Inputs:
    return {"input_ids": token_ids(), "labels": token_ids()}


def classes() -> Inputs:
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 2])}


def image() -> Inputs:
    return {"pixel_values": _random(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def pairs() -> Inputs:
    return {"input_ids": token_ids(), "pixel_values": _random(2, 3, 16, 16), "return_loss": torch.tensor(True)}


def speech() -> Inputs:
    return {"input_features": _random(2, 8, 16), "labels": token_ids()}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _made(cls: type, config: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        model = cls(config).eval()
        # biases and norms start at zero and one, where mistakes would not be seen
        randomise((p for n, p in model.named_parameters() if n.endswith("bias")), seed=5, scale=0.1)
        return model

    return build


def _decoder(cls: type, config: type, **fields: Any) -> Callable[[], Any]:
    return _made(cls, config(**{**DECODER, **fields}))


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
QV, KO = ["q_proj", "v_proj", "down_proj"], ["k_proj", "o_proj", "up_proj"]

FAMILIES: dict[str, Family] = {
    "llama": Family(_decoder(tf.LlamaForCausalLM, tf.LlamaConfig), text, QV, KO),
    "mistral": Family(_decoder(tf.MistralForCausalLM, tf.MistralConfig), text, QV, KO),
    "qwen3": Family(_decoder(tf.Qwen3ForCausalLM, tf.Qwen3Config, head_dim=8), text, QV, KO),
    "gemma2": Family(_decoder(tf.Gemma2ForCausalLM, tf.Gemma2Config, head_dim=8), text, QV, KO),
    "phi3": Family(
        _decoder(tf.Phi3ForCausalLM, tf.Phi3Config), text, ["qkv_proj", "down_proj"], ["o_proj", "gate_up_proj"]
    ),
    "mixtral": Family(
        _decoder(tf.MixtralForCausalLM, tf.MixtralConfig, num_local_experts=3, **MOE), text, ["q_proj", "v_proj"],
        ["k_proj", "o_proj"], EXPERTS,
    ),
    "qwen3 moe": Family(
        _decoder(
            tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, num_experts=3, moe_intermediate_size=20, head_dim=8,
            decoder_sparse_step=2, **MOE,
        ),
        text, ["q_proj", "v_proj"], ["k_proj", "o_proj"], EXPERTS,
    ),
    "gpt2": Family(
        _made(
            tf.GPT2LMHeadModel,
            tf.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_inner=36, n_positions=32),
        ),
        text, ["c_attn", "mlp.c_proj"], ["c_fc"],
    ),
    "opt": Family(
        _made(
            tf.OPTForCausalLM,
            tf.OPTConfig(
                vocab_size=VOCABULARY, hidden_size=24, ffn_dim=36, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, word_embed_proj_dim=24, pad_token_id=0,
            ),
        ),
        text, ["q_proj", "v_proj", "fc2"], ["k_proj", "out_proj", "fc1"],
    ),
    "bert": Family(
        _made(tf.BertForSequenceClassification, tf.BertConfig(**ENCODER)), classes, ["query", "value"],
        ["key", "output.dense"],
    ),
    "roberta": Family(
        _made(tf.RobertaForSequenceClassification, tf.RobertaConfig(**ENCODER)), classes, ["query", "value"],
        ["key", "intermediate.dense"],
    ),
    "t5": Family(
        _made(
            tf.T5ForConditionalGeneration,
            tf.T5Config(
                vocab_size=VOCABULARY, d_model=24, d_kv=5, d_ff=36, num_layers=2, num_heads=4, decoder_start_token_id=0
            ),
        ),
        text, ["q", "v", "wo"], ["k", "o", "wi"],
    ),
    "bart": Family(
        _made(
            tf.BartForConditionalGeneration,
            tf.BartConfig(
                vocab_size=VOCABULARY, d_model=24, encoder_ffn_dim=36, decoder_ffn_dim=40, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
            ),
        ),
        text, ["q_proj", "v_proj", "fc2"], ["k_proj", "out_proj", "fc1"],
    ),
    "vit": Family(
        _made(tf.ViTForImageClassification, tf.ViTConfig(**VISION, num_labels=3)), image, ["q_proj", "v_proj"],
        ["k_proj", "fc1"],
    ),
    "clip": Family(
        _made(
            tf.CLIPModel,
            tf.CLIPConfig(
                text_config={k: v for k, v in ENCODER.items() if k != "num_labels"} | {"projection_dim": 20},
                vision_config={**VISION, "projection_dim": 20}, projection_dim=20,
            ),
        ),
        pairs, ["q_proj", "v_proj", "text_projection"], ["k_proj", "fc1", "visual_projection"],
    ),
    "whisper": Family(
        _made(
            tf.WhisperForConditionalGeneration,
            tf.WhisperConfig(
                vocab_size=VOCABULARY, d_model=24, encoder_ffn_dim=36, decoder_ffn_dim=40, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8,
                max_source_positions=8, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            ),
        ),
        speech, ["q_proj", "v_proj", "fc2"], ["k_proj", "out_proj", "fc1", "conv1"],
    ),
}  # fmt: skip


def first_output(output: Any) -> Tensor:
    """The tensor of an output that everything else is made from."""
    for name in ("logits", "logits_per_image"):
        if name in output:
            found: Tensor = output[name]
            return found
    raise KeyError(f"no known output among {list(output)}")
