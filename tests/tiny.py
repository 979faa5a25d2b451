"""Tiny models whose layers are nowhere square, and random values for their adapters."""

from __future__ import annotations

from collections.abc import Iterable
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

VOCABULARY = 40


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers; grouped-query attention makes k_proj and v_proj [16, 32]."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers of transformers' Conv1D, whose weights are stored [in, out]; the head is tied to wte."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_inner=36, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    randomise((p for n, p in model.named_parameters() if n.endswith("bias")), seed=5)
    return model


def tiny_bert() -> BertForSequenceClassification:
    """A sequence classifier; GPT-2's and BERT's biases start at zero, so they get random values."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    randomise((p for n, p in model.named_parameters() if n.endswith("bias")), seed=5)
    return model


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions: padded in a circle, strided, grouped and dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular")
        self.plane = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(6, 4, 3, padding="same", dilation=2, groups=2, bias=False)
        self.space = nn.Conv3d(1, 5, (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 3, 16]``."""
        h = self.line(x).relu()  # [batch, 8, 16]
        h = self.plane(h.view(-1, 2, 8, 8)).relu()
        h = self.grouped(h).unsqueeze(1)
        return self.space(h).flatten(1)


class Layer(nn.Module):
    """Two linear modules around a tanh, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., 6]``."""
        return x + self.down(torch.tanh(self.up(x)))


def two_linears() -> nn.Module:
    """Takes ``[..., 5]``, gives ``[..., 3]``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()


def conv_net() -> ConvNet:
    """The net above."""
    torch.manual_seed(0)
    return ConvNet().eval()


def token_ids(batch: int = 2, length: int = 6) -> Tensor:
    """Fixed token ids; padding, 0, is not among them."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    """Of the fixed token ids, or of these."""
    found: Tensor = model(token_ids() if ids is None else ids).logits
    return found


@torch.no_grad()
def randomise(tensors: Iterable[Tensor], seed: int = 0, scale: float = 0.3) -> None:
    """Overwrite an adapter's tensors, LoRA's zero B among them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
