"""A model that is a part of the one an adapter is of, as a pipeline's stage: what its modules have in the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Layer, randomise
from torch import Tensor, nn

import fxpeft


class Stack(nn.Module):
    """Layers under the numbers that they have in the whole model."""

    def __init__(self, numbers: range = range(4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {str(number): Layer() for number in range(4)}
        self.layers, self.head = nn.ModuleDict({str(n): layers[str(n)] for n in numbers}), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x) if "3" in self.layers else x


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Stack()
    config = fxpeft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["up", "down"], rank_pattern={"layers.0.up": 2}, modules_to_save=["head"],
        bias="lora_only",
    )  # fmt: skip
    fxpeft.add_adapter(model, config)
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    fxpeft.save_adapter(model, tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*(modules_to_save|rank_pattern)")
def test_stages_together_are_the_whole_model(folder: Path) -> None:
    whole, x = Stack(), torch.randn(5, 6)
    fxpeft.load_adapter(whole, folder)
    first, second = Stack(range(2)), Stack(range(2, 4))
    with pytest.raises(fxpeft.CheckpointError, match=r"(?s)no place in the model.*layers\.2\.up\.lora_A.*partial=True"):
        fxpeft.load_adapter(first, folder)
    for stage, absent in ((first, "layers.3.down"), (second, "layers.0.up")):
        with pytest.warns(UserWarning, match=rf"(?s)partial=True: the model has none of these.*{absent}: 3 tensors"):
            fxpeft.load_adapter(stage, folder, partial=True)
    torch.testing.assert_close(second(first(x)), whole(x))
    fxpeft.prepare_hotswap(second, 8, bias="lora_only", modules_to_save=["head"])
    with pytest.warns(UserWarning, match="layers.1.up: 3 tensors"):
        fxpeft.hotswap(second, folder, partial=True)
    torch.testing.assert_close(second(first(x)), whole(x))


@pytest.mark.filterwarnings("ignore:.*(modules_to_save|rank_pattern|partial)")
@pytest.mark.parametrize("typo", ["layers.1.up.lora_C.weight", "layers.1.up.weird"])
def test_a_part_takes_no_keys_that_its_modules_have_no_place_for(typo: str, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, f"base_model.model.{typo}": torch.ones(3, 6)}, file)
    with pytest.raises(fxpeft.CheckpointError, match=rf"no place in the model:\n  {re.escape(typo)}"):
        fxpeft.load_adapter(Stack(range(2)), folder, partial=True)
