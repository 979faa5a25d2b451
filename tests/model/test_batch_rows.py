"""Slots with lanes are refused at preparation where a target doesn't see the batch's rows one by one in their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError


class Net(nn.Module):
    """Two projections with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.dummy_inputs = between, {"x": torch.zeros(2, 4, 6)}
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[rows, tokens, 6]``."""
        return self.down(self.between(self.up(x)))  # type: ignore[no-any-return]


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "flattened": (lambda x: x.flatten(0, 1), r"down: an input of \[44, 7\] for a batch of 11"),
    "transposed": (lambda x: x.transpose(0, 1), r"down: an input of \[4, 11, 7\] for a batch of 11"),
    "flipped": (lambda x: x.flip(0), "down: rows that were picked or put in another order"),
    "rolled": (lambda x: x.roll(1, 0) * 2, "down: rows that were picked"),
    "sorted": (lambda x: x.sort(dim=0)[0], "down: rows that were picked"),
    "picked": (lambda x: x[x[:, 0, 0].argsort()], "down: rows that were picked"),
    "selected": (lambda x: x.index_select(0, x[:, 0, 0].argsort()), "down: rows that were picked"),
    "regrouped": (lambda x: x.transpose(0, 1).reshape(x.shape), "down: rows that were picked"),
    "regrouped first": (lambda x: x.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1), "down: rows that were picked"),
    "regrouped with features": (lambda x: x.flatten(0, 1).T.reshape(x.shape).tanh(), "down: rows that were picked"),
    "flipped beside": (lambda x: x.transpose(0, 1).flip(1).transpose(0, 1), "down: rows that were picked"),
    "rolled beside": (lambda x: x.permute(1, 2, 0).roll(1, -1).permute(2, 0, 1), "down: rows that were picked"),
    "picked beside": (lambda x: x.mT.movedim(0, 2)[:, :, x[:, 0, 0].argsort()].movedim(2, 0).mT, "down: rows that"),
    "summed": (lambda x: x.sum(0), r"down: an input of \[4, 7\]"),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda x: x[:, 0],
    "pooled at the last": lambda x: x[torch.arange(x.shape[0]), torch.full((x.shape[0],), -1)],
    "there and back": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "through a flattened batch": lambda x: (x.flatten(0, 1) * 2).relu().view(x.shape[0], -1, x.shape[-1]),
    "regrouped and back": lambda x: (
        (x.transpose(0, 1).reshape(x.shape) * 2).view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    ),
    "heads": lambda x: _heads(x),
    "other tokens": lambda x: x.flip(1).index_select(1, torch.tensor([0, 2])),
}


def _heads(x: Tensor) -> Tensor:
    """Attention with the batch behind the tokens, in one dimension with the heads."""
    x = x[..., :6].transpose(0, 1)
    tokens, rows, _ = x.shape
    q = x.reshape(tokens, rows * 2, 3).transpose(0, 1)
    out = torch.bmm(torch.bmm(q, q.mT).softmax(-1), q).transpose(0, 1).reshape(tokens, rows, 6)
    return torch.nn.functional.pad(out, (0, 1)).transpose(0, 1)


@pytest.mark.parametrize("case", BETWEEN)
def test_other_rows_are_refused(case: str) -> None:
    between, message = BETWEEN[case]
    model = Net(between).eval()
    with pytest.raises(AdapterError, match=message) as error:
        fxpeft.prepare_hotswap(model, 8, targets=["up", "down"], lanes=2)
    assert " up:" not in str(error.value)
    assert type(model.up) is nn.Linear
    fxpeft.prepare_hotswap(model, 8, targets=["up"], lanes=2)


@pytest.mark.parametrize("case", KEPT)
def test_rows_that_stay_are_seen(case: str) -> None:
    model = Net(KEPT[case]).eval()
    fxpeft.prepare_hotswap(model, 8, targets=["up", "down"], lanes=2)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["down"], init_lora_weights=False), "a")
    x = torch.randn(3, 4, 6)
    expected = model(x)
    with fxpeft.rows(model, ["a", None, "a"]):
        torch.testing.assert_close(model(x)[::2], expected[::2])


def test_families() -> None:
    for make in (tiny_llama, tiny_gpt2, tiny_bert):
        fxpeft.prepare_hotswap(make(), 8, targets="all-linear", lanes=2)
    with pytest.raises(AdapterError, match=r"transformer\.wpe: an input of \[1, 6\]"):
        fxpeft.prepare_hotswap(tiny_gpt2(), 8, targets=["wpe", "c_attn"], lanes=2)


def test_a_target_that_flattens_what_it_gets_sees_rows() -> None:
    model, ids = tiny_gpt2(), torch.arange(10).view(2, 5)  # its Conv1D
    bare = model(ids).logits.detach()
    fxpeft.prepare_hotswap(model, 8, targets=["c_attn", "c_fc"], lanes=2)
    config = fxpeft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    fxpeft.add_adapter(model, config, "a")
    expected = model(ids).logits
    assert not torch.allclose(expected, bare)
    with fxpeft.rows(model, ["a", None]):
        found = model(ids).logits
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], bare[1])


def test_a_model_that_tells_no_inputs_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"whether each target sees the rows.*`dummy_inputs`"):
        fxpeft.prepare_hotswap(nn.Sequential(nn.Linear(3, 4)), 8, targets=["0"], lanes=2)


def test_parameters_are_refused() -> None:
    model = Net(torch.tanh)
    with pytest.raises(AdapterError, match=r"up\.weight: a parameter is the same for all rows"):
        fxpeft.prepare_hotswap(model, 8, targets=["down"], target_parameters=["up.weight"], lanes=2)
