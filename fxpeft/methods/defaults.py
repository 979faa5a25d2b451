"""The modules that PEFT 0.21 adapts by default, so that a config without targets means the same in both libraries.

The tables are of ``TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`` and those of the same kind for other methods.
"""

from __future__ import annotations

from torch import nn

from fxpeft.errors import AdapterError

TARGETS: dict[str, list[str] | str] = {
    **{
        name: ["q_proj", "v_proj"]
        for name in (
            "bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2",
            "gemma3_text", "qwen2", "qwen3",
        )
    },
    **{name: ["query", "value"] for name in ("bert", "roberta", "xlm-roberta", "electra", "layoutlm")},
    **{
        name: ["query_key_value"]
        for name in ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon")
    },
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ["Wqkv"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}  # fmt: skip
# where another method differs (PEFT's mappings of the same name)
ADALORA_TARGETS: dict[str, list[str] | str] = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}
IA3_TARGETS: dict[str, list[str] | str] = {
    **{
        name: ["q_proj", "v_proj", "down_proj"]
        for name in ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")
    },
    **{name: ["k_proj", "v_proj", "down_proj"] for name in ("llama", "mistral")},
    **{name: ["key", "value", "output.dense"] for name in ("bert", "roberta")},
    **{name: ["query_key_value", "dense_4h_to_h"] for name in ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon")},
    **{name: ["c_attn", "mlp.c_proj"] for name in ("gpt2", "gpt_bigcode")},
    "mixtral": ["k_proj", "v_proj", "w2"],
    "t5": ["k", "v", "wo"],
    "mt5": ["k", "v", "wi_1"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "deberta": ["in_proj", "output.dense"],
}
BEFT_TARGETS: dict[str, list[str] | str] = {
    **{
        name: ["v_proj"]
        for name in (
            "bart",
            "opt",
            "gptj",
            "gpt_neo",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
            "phi",
        )
    },
    **{name: ["value"] for name in ("bert", "roberta")},
    "t5": ["v"],
    "mt5": ["v"],
    "deberta-v2": ["value_proj"],
}
LN_TARGETS: dict[str, list[str]] = {
    **{name: ["input_layernorm", "post_attention_layernorm", "norm"] for name in ("llama", "mistral", "gemma")},
    **{name: ["input_layernorm", "post_attention_layernorm", "ln_f"] for name in ("bloom", "falcon")},
    "llava": [
        "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head",
    ],
    "t5": ["layer_norm", "final_layer_norm"],
    "mt5": ["layer_norm", "final_layer_norm"],
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "gptj": ["ln_1", "ln_f"],
    "phi": ["input_layernorm", "final_layernorm"],
    **{
        name: [
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
            "norm",
        ]
        for name in ("gemma2", "gemma3_text")
    },
    "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
}  # fmt: skip
_WHOLE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
_DECODER = ["q_proj", "k_proj", "v_proj", "out_proj"]
OSF_TARGETS: dict[str, list[str] | str] = {  # of others all linear layers
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"), _WHOLE),
    **dict.fromkeys(("qwen2", "qwen3", "phi"), _WHOLE),
    "opt": [*_DECODER, "fc1", "fc2"],
    "gptj": [*_DECODER, "fc_in", "fc_out"],
    **{name: ["query_key_value", "dense_4h_to_h"] for name in ("bloom", "gpt_neox", "falcon")},
    **{name: ["c_attn", "c_proj"] for name in ("gpt2", "gpt_bigcode")},
}  # fmt: skip
_FEW: dict[str, list[str] | str] = {"phi": ["q_proj", "v_proj"]}
_SECOND: dict[str, list[str] | str] = {name: ["mlp.c_proj"] for name in ("gpt2", "gpt_bigcode")}
# method -> where its own table differs
OWN_TARGETS: dict[str, dict[str, list[str] | str]] = {
    "adalora": ADALORA_TARGETS,
    "ia3": IA3_TARGETS,
    "beft": BEFT_TARGETS,
    "vblora": {name: targets for name, targets in ADALORA_TARGETS.items() if name != "roberta"},
    "osf": OSF_TARGETS,
    "vera": _FEW,
    "shira": _FEW,
    "pvera": {**_FEW, "dinov2": ["query", "value"]},
    "adamss": {"vit": ["query", "value"]},
    "c3a": _SECOND,
    "fourierft": _SECOND,
    "waveft": _SECOND,
}
_FEEDFORWARD = (
    "down_proj", "output.dense", "dense_4h_to_h", "mlp.c_proj", "w2", "wo", "mlp.dense_4h_to_h", "fc2", "fc_out",
    "c_proj",
)  # fmt: skip


def model_type_of(model: nn.Module) -> str | None:
    """The architecture that a Transformers model's config names, or ``None``."""
    return getattr(getattr(model, "config", None), "model_type", None)


def default_feedforward(model: nn.Module) -> list[str]:
    """``feedforward_modules`` of IA3 for a model whose config names none.

    Raises:
        AdapterError: the architecture is unknown.
    """
    model_type = model_type_of(model)
    if model_type not in IA3_TARGETS:
        raise AdapterError(
            f"no default feedforward_modules for {type(model).__name__} (model_type {model_type!r}): name those of the "
            "target_modules whose input IA3 should multiply, or [] for none"
        )
    return [name for name in IA3_TARGETS[model_type] if name in _FEEDFORWARD]
