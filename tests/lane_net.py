"""A small model with every kind of target that rows can have adapters at, and adapters of every such method for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from adapter_files import save_each
from torch import Tensor, nn

import fxpeft

METHODS = ("lora", "lora_bias", "dora", "ia3", "adalora", "oft")
TARGETS = ("embed", "conv", "up", "down")
IDS = torch.randint(0, 17, (8, 5), generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, Any] = {
    "lora": fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed", "conv", "up", "down"]),
    "rslora": fxpeft.LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules=["up", "embed"]),
    "dora": fxpeft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["conv", "up", "embed"]),
    "ia3": fxpeft.IA3Config(target_modules=["conv", "up", "down"], feedforward_modules=["down"]),
    "bias": fxpeft.LoraConfig(r=1, lora_alpha=4, lora_bias=True, target_modules=["conv", "down"]),
    "oft": fxpeft.OFTConfig(oft_block_size=3, target_modules=["down"]),
    "adalora": fxpeft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["up", "down"]),
}


class Net(nn.Module):
    """Takes ids ``[rows, tokens]``, gives ``[rows, tokens, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy_inputs = {"ids": IDS[:2]}
        self.embed, self.conv = nn.Embedding(17, 6), nn.Conv1d(6, 7, 3, padding=1)
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.down(self.up(x).tanh())  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def write(folder: Path) -> dict[str, str]:
    """Name -> folder of an adapter of each method."""
    return save_each(net, CONFIGS, folder)


def alone(folder: str | None) -> Tensor:
    """What an adapter gives that is freshly loaded, for all rows; the base's output without one."""
    model = net()
    if folder is not None:
        fxpeft.load_adapter(model, folder)
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


def prepared(folders: Mapping[str, str], max_rank: int = 24, **settings: Any) -> Net:
    """With all of them loaded, the last one active."""
    model = net()
    settings = {"targets": TARGETS, "methods": METHODS, "lanes": len(CONFIGS), **settings}
    fxpeft.prepare_hotswap(model, max_rank, **settings)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    return model
