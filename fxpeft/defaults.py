"""Default targets where a config names none: the architecture's usual ones, else its attention's.

The table states which modules PEFT 0.21 adapts by default
(``TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING``), so that a config without targets means the
same in both libraries. Any other model is traced; see :func:`fxpeft.attention.attention_targets`.
"""

from __future__ import annotations

from torch import nn

from fxpeft.attention import attention_targets
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


def default_targets(model: nn.Module) -> list[str] | str:
    """``target_modules`` for a model whose config names none.

    Raises:
        AdapterError: the architecture is unknown and no attention was found in its graph.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in TARGETS:
        return TARGETS[model_type]
    found = attention_targets(model)
    if not found:
        raise AdapterError(
            f"no default target_modules for {type(model).__name__} (model_type {model_type!r}): tracing it found no "
            "attention; name target_modules, or use 'all-linear'"
        )
    return found
