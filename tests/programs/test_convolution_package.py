"""A package with convolutions: every rank and size is what the live model gives, or no package is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from torch.export import Dim

import fxpeft
from fxpeft.passes.targets.operations import Conv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
MAX_RANK = 7


class Net(nn.Module):
    """Padded, strided and pointwise; nowhere square."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(9, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 6, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 9, height, width]``."""
        found: Tensor = self.point(torch.tanh(self.down(torch.tanh(self.body(x)))))
        return found


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 9, 8, 9, generator=torch.Generator().manual_seed(1))
SITES = ["body", "down", "point"]


def saved(folder: Path, rank: int) -> nn.Module:
    """An adapter that PEFT writes, and the model that PEFT reads it into."""
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=SITES, alpha_pattern={"down": 5})
    model = peft.get_peft_model(net(), config)
    randomise((p for n, p in model.named_parameters() if "lora_" in n), rank)
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(net(), str(folder)).eval()


@pytest.mark.slow
def test_every_rank_and_size(tmp_path: Path) -> None:
    sizes = {0: Dim("batch", min=2, max=9), 2: Dim("height", min=4, max=32)}
    path = fxpeft.package(net(), tmp_path / "net.pt2", (X,), max_rank=MAX_RANK, targets=SITES, dynamic_shapes=(sizes,))
    served = fxpeft.open_package(path)
    other = torch.randn(5, 9, 11, 9)
    for rank in (*range(1, MAX_RANK + 1), 2):
        wanted = saved(tmp_path / str(rank), rank)
        served.hotswap(tmp_path / str(rank))
        with torch.no_grad():
            for x in (X, other):
                assert_close(served(x), wanted(x))
                assert (served(x) - net()(x)).abs().max() > 0.01
    served.disable()
    with torch.no_grad():
        assert_close(served(other), net()(other), terms=1, size=1.0)


@pytest.mark.slow
def test_a_package_that_holds_for_one_rank_only_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Conv, "reduce_rows", Conv.reduce)  # Inductor's convolution fixes every size of its weight
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    path = tmp_path / "net.pt2"
    with pytest.raises(fxpeft.AdapterError, match=r"(?s)the active rank: .*rank='static'"):
        fxpeft.package(model, path, (torch.randn(1, 3, 2, 2),), max_rank=MAX_RANK, targets=["0"])
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []
    fxpeft.package(model, path, (torch.randn(1, 3, 2, 2),), max_rank=MAX_RANK, targets=["0"], rank="static")
    assert path.exists()


class Fixing(nn.Module):
    """Inductor fixes the sizes of a convolution's weight, which here are the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[channels, 3]``."""
        h: Tensor = self.line(x)
        return torch.nn.functional.conv1d(h[:2].t()[None], h[:, :, None])


@pytest.mark.slow
def test_an_input_that_is_compiled_for_one_size_only_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(fxpeft.AdapterError, match=r"input x, dimension 0: 5"):
        fxpeft.package(
            Fixing().eval(), tmp_path / "net.pt2", (torch.randn(5, 3),), max_rank=MAX_RANK, targets=["line"],
            dynamic_shapes=({0: Dim("channels", min=2, max=9)},),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
