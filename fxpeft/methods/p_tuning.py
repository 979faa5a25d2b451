"""P-tuning (https://arxiv.org/abs/2103.10385): prompt tuning whose rows come out of a small network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fxpeft.methods.prompts import PromptLearningConfig, PromptMethod, PromptPlan


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Names and defaults of ``peft.PromptEncoderConfig``.

    Args:
        encoder_reparameterization_type: ``"MLP"``: three linear layers; ``"LSTM"``: two directions,
            then two linear layers.
        encoder_hidden_size: ``None``: the prompt's width.
        encoder_num_layers, encoder_dropout: of the LSTM.
    """

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    peft_type: ClassVar[str] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("encoder_hidden_size", "encoder_num_layers")
        self.check_probability("encoder_dropout")
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            warnings.warn("encoder_num_layers is ignored for the MLP, which has two hidden layers", stacklevel=3)


class LstmEncoder(nn.Module):
    """PEFT's: an LSTM along the prompt in both directions, and a network on each row of its output."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, embedding: Tensor) -> Tensor:
        """``[rows, width] -> [rows, width]``."""
        out: Tensor = self.mlp_head(self.lstm_head(embedding)[0])
        return out


class PTuning(PromptMethod[PromptEncoderConfig]):
    """Trained with its network; saved, loaded and served as the rows that come out of it."""

    name = "p_tuning"
    peft_type = "P_TUNING"
    config_class = PromptEncoderConfig

    def encoder(self, config: PromptEncoderConfig, plan: PromptPlan) -> nn.Module:
        width, hidden = plan.width, config.encoder_hidden_size or plan.width
        if config.encoder_reparameterization_type == "LSTM":
            return LstmEncoder(width, hidden, config.encoder_num_layers, config.encoder_dropout)
        return nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )
