"""Deployment end to end: train adapters, package the base once, serve it without model code, swap.

Runs offline on a tiny random model: ``python examples/deploy.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import fxpeft

VOCABULARY, WIDTH = 32, 24


class Tagger(nn.Module):
    """A small network: a tag for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, length]`` to ``[batch, length, 4]``."""
        h = self.words(ids)
        return self.head(h + self.down(torch.relu(self.up(h))))


def train(folder: Path, shift: int, rank: int) -> Tensor:
    """Train an adapter to tag a token with ``(token + shift) % 4``, save it, and return its tags of all tokens."""
    torch.manual_seed(0)
    model = Tagger()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=rank, target_modules=["up", "down", "head"]))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
    ids = torch.arange(VOCABULARY).view(1, -1)
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(ids)[0], (ids[0] + shift) % 4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    fxpeft.save_adapter(model, folder)
    return model.eval()(ids).argmax(-1)


def main(folder: Path) -> None:
    """Train two adapters of different rank, package the base, then serve both from the package."""
    ids = torch.arange(VOCABULARY).view(1, -1)
    wanted = {name: train(folder / name, shift, rank) for name, shift, rank in (("a", 0, 8), ("b", 1, 3))}

    torch.manual_seed(0)
    path = fxpeft.package(
        Tagger().eval(), folder / "tagger.pt2", (ids.repeat(2, 1),), max_rank=16, targets=["up", "down", "head"],
        dynamic_shapes=({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)},),
    )  # fmt: skip

    served = fxpeft.open_package(path)  # from here on nothing needs Tagger
    for name, tags in wanted.items():
        served.hotswap(folder / name)  # copies; nothing compiles
        found = served(ids).argmax(-1)
        assert torch.equal(found, tags)
        print(f"{name}: first tags {found[0, :8].tolist()}")
    served.save_slots(folder / "b.safetensors")  # for examples/cpp/host.cpp


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
