"""Tiny vision-language models, and the names that Transformers before 4.52 had for their modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
IMAGE = 59


@dataclass(frozen=True)
class VisionLanguage:
    """How to build a model and its inputs, its targets in both towers, and old names by new: regex -> replacement."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    before: dict[str, str]

    def old(self, name: str) -> str:
        """A module's or key's name before Transformers 4.52."""
        for pattern, replacement in self.before.items():
            renamed, hits = re.subn(pattern, replacement, name)
            if hits:
                return renamed
        return name


def _built(cls: type, config: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return cls(config).eval()

    return build


def _ids(images: int) -> Tensor:
    ids = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 1 : 1 + images] = IMAGE
    return ids


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _llava() -> dict[str, Tensor]:
    return {"input_ids": _ids(4), "pixel_values": _pixels(2, 3, 16, 16)}


def _qwen() -> dict[str, Tensor]:
    ids = _ids(4)
    ids[:, 0] = 57  # vision start
    # two images of 4 x 4 patches, 2 x 2 of them merged
    return {
        "input_ids": ids, "pixel_values": _pixels(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip


LLAVA = {
    r"model\.language_model\.": "language_model.model.",
    r"model\.vision_tower\.(?!vision_model)": "vision_tower.vision_model.",
    r"model\.multi_modal_projector\.": "multi_modal_projector.",
    r"^((?:base_model\.model\.)?)lm_head": r"\1language_model.lm_head",
}
MODELS: dict[str, VisionLanguage] = {
    "llava": VisionLanguage(
        _built(
            tf.LlavaForConditionalGeneration,
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT),
                image_token_index=IMAGE, vision_feature_layer=-1,
            ),
        ),
        _llava, ("q_proj", "v_proj"), LLAVA,
    ),
    "paligemma": VisionLanguage(
        _built(
            tf.PaliGemmaForConditionalGeneration,
            tf.PaliGemmaConfig(
                vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
                text_config=tf.GemmaConfig(**TEXT, head_dim=8), image_token_index=IMAGE, projection_dim=32,
            ),
        ),
        _llava, ("q_proj", "v_proj"), LLAVA,
    ),
    "qwen2 vl": VisionLanguage(
        _built(
            tf.Qwen2VLForConditionalGeneration,
            tf.Qwen2VLConfig(
                text_config={
                    **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
                },
                vision_config={
                    "embed_dim": 24, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2
                },
                image_token_id=IMAGE, vision_start_token_id=57, vision_end_token_id=58,
            ),
        ),
        _qwen, ("q_proj", "v_proj", "attn.qkv", "attn.proj"),
        {r"model\.language_model\.": "model.", r"model\.visual\.": "visual."},
    ),
}  # fmt: skip
