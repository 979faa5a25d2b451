"""Prompt tuning (https://arxiv.org/abs/2104.08691): trained embeddings before those of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SitePlan
from fxpeft.methods.prompts import PromptLearningConfig, PromptMethod


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Names and defaults of ``peft.PromptTuningConfig``.

    Args:
        prompt_tuning_init: ``"RANDOM"``: normal; ``"SAMPLE_VOCAB"``: embeddings of random tokens;
            ``"TEXT"``: those of a text, cut or repeated to the prompt's length.
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: for ``"TEXT"``; the tokenizer
            is loaded through ``AutoTokenizer``, never with ``trust_remote_code``.
    """

    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise AdapterError(f"{name}: prompt_tuning_init='TEXT' needs it, found {getattr(self, name)!r}")
        elif self.tokenizer_kwargs:
            raise AdapterError("tokenizer_kwargs: only for prompt_tuning_init='TEXT'")


class PromptTuning(PromptMethod[PromptTuningConfig]):
    """The rows are added to the embeddings; an encoder-decoder's encoder gets them."""

    name = "prompt_tuning"
    peft_type = "PROMPT_TUNING"
    config_class = PromptTuningConfig

    def fresh(
        self, config: PromptTuningConfig, plan: SitePlan, base: Base, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        parameters = super().fresh(config, plan, base, device=device, dtype=dtype)
        if config.prompt_tuning_init == "RANDOM" or config.inference_mode:
            return parameters
        embeddings = base.module.get_input_embeddings()  # type: ignore[operator]
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, embeddings.weight.shape[0], (len(parameters["embedding"]),))
        else:
            ids = torch.tensor(_text_ids(config, len(parameters["embedding"])))
            most = embeddings.weight.shape[0]
            if int(ids.max()) >= most:
                raise AdapterError(
                    f"tokenizer_name_or_path: {config.tokenizer_name_or_path} gives token {int(ids.max())}, the "
                    f"model's vocabulary ends at {most - 1}; is it another model's tokenizer?"
                )
        with torch.no_grad():
            rows: Tensor = embeddings(ids.to(embeddings.weight.device))
        return {"embedding": rows.detach().to(device, torch.float32, copy=True)}


def _text_ids(config: PromptTuningConfig, count: int) -> list[int]:
    """The first ``count`` token ids of the text, repeated as often as that takes."""
    from transformers import AutoTokenizer

    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    except (OSError, ValueError) as error:
        raise AdapterError(f"tokenizer_name_or_path: {config.tokenizer_name_or_path}: {error}") from error
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise AdapterError(f"prompt_tuning_init_text: {config.prompt_tuning_init_text!r} has no tokens")
    return (ids * -(-count // len(ids)))[:count]
