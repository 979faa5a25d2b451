"""Activated LoRAs in exported programs: which tokens they act on is one more input, against the live model."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from adapter_files import save
from closeness import assert_close
from torch import Tensor, nn
from torch.export import Dim

import fxpeft

CALL = [7, 3]
IDS = torch.tensor([[5, 7, 3, 2, 9], [5, 7, 2, 3, 9], [7, 3, 5, 7, 3]])
CONFIG = fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], alora_invocation_tokens=CALL)


class Net(nn.Module):
    """A look-up, linears of tokens, and ``pooled``, which sees no tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(12, 5), nn.Linear(5, 7), nn.Linear(7, 3)
        self.pooled = nn.Linear(3, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.down(self.up(self.words(ids)).tanh())
        return h, self.pooled(h.mean(1))


class Two(Net):
    def forward(self, ids: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(ids + more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(Net(), CONFIG, tmp_path_factory.mktemp("reach"), seed=3)


def exported(dynamic: bool, inference: bool) -> Any:
    shapes = {"ids": {0: Dim("rows", min=1, max=8), 1: Dim("tokens", min=2, max=16)}} if dynamic else None
    program = torch.export.export(Net().eval(), (), {"ids": IDS}, dynamic_shapes=shapes)
    return program.run_decompositions() if inference else program


@torch.no_grad()
@pytest.mark.parametrize(("dynamic", "inference"), [(False, False), (True, False), (True, True)])
def test_a_program_takes_which_tokens_are_acted_on(dynamic: bool, inference: bool, folder: str) -> None:
    program, live = exported(dynamic, inference), Net()
    fxpeft.load_adapter(live, folder)
    made = fxpeft.rewrite(program, folder)
    content = io.BytesIO()
    torch.export.save(made, content)
    content.seek(0)
    for each in (made, torch.export.load(content)):
        call = each.module()
        for ids in (IDS, IDS.flip(0), *([IDS[:2].repeat(1, 3)] if dynamic else [])):
            found = call(ids=ids, adapter_reach=fxpeft.invoked(ids, CALL))[0]
            assert_close(found, live(ids)[0])
            nowhere = torch.zeros(ids.shape, dtype=torch.bool)
            assert_close(call(ids=ids, adapter_reach=nowhere)[0], Net()(ids)[0])
    bare = fxpeft.eject(made)
    assert str(bare.graph) == str(program.graph)
    assert bare.range_constraints == program.range_constraints
    assert_close(bare.module()(ids=IDS)[0], Net()(IDS)[0])


@torch.no_grad()
def test_slots_take_it_beside_values_and_rank(folder: str) -> None:
    slots = fxpeft.Slots(["up", "down"], 4, methods=("lora", "alora"), rank="dynamic")
    made = fxpeft.rewrite(exported(True, False), slots, adapters="inputs")
    assert list(made.example_inputs[1]) == ["ids", "adapters", "adapter_reach", "active_rank"]
    live, values = Net(), {name: tensor.clone() for name, tensor in fxpeft.adapter_inputs(made).items()}
    fxpeft.load_adapter(live, folder)
    for site in ("up", "down"):
        own = {key.split(".")[-2]: t for key, t in fxpeft.adapter_state_dict(live).items() if f".{site}." in key}
        values[f"{site}.a"][:3], values[f"{site}.b"][:3] = own["lora_A"], own["lora_B"].t()
        values[f"{site}.d"][:3] = 5 / 3
    rank = torch.zeros(3, dtype=torch.uint8)
    found = made.module()(ids=IDS, adapters=values, adapter_reach=fxpeft.invoked(IDS, CALL), active_rank=rank)
    assert_close(found[0], live(IDS)[0])
    one = fxpeft.rewrite(exported(True, False), CONFIG.changed(target_modules=["up"]))
    with pytest.raises(fxpeft.AdapterError, match="takes an adapter as input already"):
        fxpeft.rewrite(one, CONFIG.changed(target_modules=["down"]))


def test_what_a_program_can_not(folder: str) -> None:
    program = exported(True, False)
    pooled = fxpeft.LoraConfig(r=2, target_modules=["pooled", "up"], alora_invocation_tokens=CALL)
    with pytest.raises(
        fxpeft.AdapterError, match=r"(?s)don't see the .* tokens of the program:\n  pooled: an input of"
    ):
        fxpeft.rewrite(program, pooled)
    with pytest.raises(fxpeft.AdapterError, match="a GraphModule isn't told which tokens"):
        fxpeft.rewrite(torch.fx.symbolic_trace(Net()), CONFIG)
    two = torch.export.export(Two(), (IDS, IDS))
    with pytest.raises(fxpeft.AdapterError, match=r"expected one input of tokens.*named input_ids, found ids, more"):
        fxpeft.rewrite(two, CONFIG)


def test_which_tokens_are_invoked() -> None:
    assert fxpeft.invoked(IDS, CALL).int().tolist() == [[0, 1, 1, 1, 1], [0] * 5, [0, 0, 0, 1, 1]]
    assert fxpeft.invoked(IDS, []).all()
    with pytest.raises(fxpeft.AdapterError, match=r"input_ids: expected \[rows, tokens\], found torch.float32"):
        fxpeft.invoked(IDS.float(), CALL)
