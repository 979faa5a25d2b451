"""Adapters that each release of PEFT wrote, under ``files/``: of which models, with which configs; see files/write.py.

Nothing here imports PEFT or fxpeft, and the models are those of every Transformers: the bases are random numbers by the
order of their names, so that the outputs that a release gave are still those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

FILES = Path(__file__).with_name("files")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY = 11


@torch.no_grad()
def fill(tensors: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Random numbers, in the order of the names; gains, norms and magnitudes are around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        one = "norm" in name.lower() or "ln_" in name or "magnitude" in name or "ia3" in name
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + (1 if one else 0))


def _filled(model: Any) -> Any:
    fill(model.named_parameters(), seed=0)
    return model.eval()


def llama() -> Any:
    """One layer; q_proj is [12, 12], k_proj and v_proj are [6, 12]."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return _filled(LlamaForCausalLM(config))


def gpt2() -> Any:
    """One layer of Conv1D, whose weights are [in, out]; a tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=6, n_layer=1, n_head=2, n_inner=7, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return _filled(GPT2LMHeadModel(config))


def bert() -> Any:
    """One layer and a classifier."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return _filled(BertForSequenceClassification(config))


class Conv(nn.Module):
    """A convolution, then a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 4, (2, 3), padding=1), nn.Conv2d(4, 6, 3, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 3, 5, 7]``."""
        return self.grouped(self.first(x).tanh())


class Experts(nn.Module):
    """A stack of matrices, which says how it is stored."""

    def __init__(self, shape: tuple[int, int, int], transposed: bool) -> None:
        super().__init__()
        self.stack, self.is_transposed = nn.Parameter(torch.empty(shape)), transposed

    def forward(self, x: Tensor) -> Tensor:
        """``[experts, batch, in] -> [experts, batch, out]``."""
        return torch.bmm(x, self.stack if self.is_transposed else self.stack.mT)


class Mixture(nn.Module):
    """Three experts of ``[out, in]``, then three of ``[in, out]``, and a linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Experts((3, 7, 5), False), Experts((3, 7, 4), True)
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 5]``."""
        return self.out(self.down(self.up(x.expand(3, *x.shape)).tanh()).sum(0))


def _ids(model: Any) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=ids).logits
    return logits


def _numbers(*shape: int) -> Callable[[Any], Tensor]:
    return lambda model: model(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@dataclass(frozen=True)
class Case:
    """An adapter.

    Args:
        base: a new bare model. config: the class's name in PEFT. fields: its arguments. run: the model's outputs.
    """

    config: str
    fields: dict[str, Any]
    base: Callable[[], Any] = llama
    run: Callable[[Any], Tensor] = field(default=_ids)


LORA: dict[str, Any] = {"r": 3, "lora_alpha": 7}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
CASES = {
    "lora": Case(
        "LoraConfig", {**LORA, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
                       "alpha_pattern": {r".*\.down_proj": 5}, "exclude_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    ),
    "rslora-layers": Case(
        "LoraConfig", {**LORA, "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "layers_to_transform": [0],
                       "layers_pattern": "layers"}
    ),
    "dora": Case("LoraConfig", {**LORA, "target_modules": "all-linear", "use_dora": True}),
    "lora-bias": Case("LoraConfig", {**LORA, "target_modules": r".*\.[ko]_proj", "lora_bias": True}),
    "embeddings": Case("LoraConfig", {**LORA, "target_modules": ["wte", "c_attn"], "bias": "all"}, gpt2),
    "biases": Case("LoraConfig", {**LORA, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}, gpt2),
    "pissa": Case("LoraConfig", {**LORA, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "classifier": Case("LoraConfig", {**LORA, "target_modules": ["query"], "task_type": "SEQ_CLS"}, bert),
    "convolutions": Case(
        "LoraConfig", {**LORA, "r": 4, "target_modules": ["first", "grouped"]}, lambda: _filled(Conv()),
        _numbers(2, 3, 5, 7),
    ),
    "adalora": Case(
        "AdaLoraConfig", {"init_r": 3, "target_r": 2, "lora_alpha": 7, "total_step": 9, "target_modules": ["q_proj"]}
    ),
    "ia3": Case(
        "IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ),
    "prompt": Case("PromptTuningConfig", PROMPT),
    "p-tuning": Case("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 5}),
    "prefix": Case("PrefixTuningConfig", PROMPT),
    "square": Case(
        "LoraConfig", {**LORA, "target_modules": [], "target_parameters": ["0.stack"]},
        lambda: _filled(nn.Sequential(Experts((3, 5, 5), False))), _numbers(3, 2, 5),
    ),
    "experts": Case(
        "LoraConfig", {**LORA, "target_modules": ["out"], "target_parameters": ["down.stack", "up.stack"]},
        lambda: _filled(Mixture()), _numbers(2, 5),
    ),
}  # fmt: skip
