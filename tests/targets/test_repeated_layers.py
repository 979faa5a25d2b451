"""A model of many layers that are alike is traced with a few of them, to the roles that all of it would have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import role_table
import torch
from role_table import FAMILIES, make
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fxpeft
from fxpeft.model.repeats import Repeats
from fxpeft.model.trace import model_flow, trace_model
from fxpeft.passes.targets.roles import roles_of_sites

LAYERS = 5
SHORT = {"gpt2", "bloom", "falcon", "opt", "mamba"}  # the table makes these of two layers


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (role_table.LLAMA, role_table.BERT, role_table.T5, role_table.BART, role_table.TOWER):
        for name in settings.keys() & {"num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"}:
            monkeypatch.setitem(settings, name, LAYERS)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in SHORT])
def test_the_roles_of_a_family_are_those_of_a_trace_of_all_its_layers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in ("gemma2", "deepseek_v3"):  # which have layers of two kinds
        monkeypatch.setitem(role_table.LLAMA, "num_hidden_layers", 8)
    model = make(family)
    assert Repeats.of(model).dropped
    assert fxpeft.roles(model) == roles_of_sites(model_flow(model))


@pytest.mark.usefixtures("deep")
def test_three_layers_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, forward = make("llama"), Counter[str](), LlamaDecoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls["layers"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    found = fxpeft.roles(model)
    assert calls["layers"] == 3  # of five
    assert found[f"model.layers.{LAYERS - 2}.mlp.down_proj"] == ("mlp.down",)
    assert list(found)[-1] == "lm_head"
    assert fxpeft.roles(model) == found
    assert calls["layers"] == 3
    trace_model(model)
    assert calls["layers"] == 3 + LAYERS


class Feed(nn.Module):
    def __init__(self, number: int, of: int = 6, second: int | None = None) -> None:
        super().__init__()
        self.number, self.of, self.second = number, of, second
        self.p, self.q = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q(self.p(x).relu())


class OfItsNumber(Feed):
    """The first ones compute something else."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.p(x)
        return x + self.q(hidden if self.number < 2 else hidden.relu())


class Net(nn.Module):
    def __init__(self, layers: Any, by_number: bool = False) -> None:
        super().__init__()
        self.layers, self.by_number = nn.ModuleList(layers), by_number
        self.count = len(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = self.layers[self.count - 1 - number](x) if self.by_number else layer(x)
        return x


def checked(net: nn.Module) -> int:
    """The layers that are left out; the roles are those of all of it."""
    inputs = {"x": torch.ones(2, 3, 8)}
    assert fxpeft.roles(net, inputs) == roles_of_sites(model_flow(net, inputs))
    return len(Repeats.of(net).dropped)


def test_what_tells_layers_apart() -> None:
    assert checked(Net(Feed(i) for i in range(6))) == 3
    assert checked(Net(Feed(i, of=5 + i % 2) for i in range(6))) == 0  # three of each kind
    assert checked(Net(Feed(i, of=5 + i % 2) for i in range(12))) == 6
    assert checked(Net(Feed(i, second=i) for i in range(6))) == 3
    assert checked(Net(Feed(i, second=5 - i) for i in range(6))) == 0
    one = Feed(0)
    assert checked(Net([one] * 6)) == 0
    narrow = Feed(3)
    narrow.p, narrow.q = nn.Linear(8, 9), nn.Linear(9, 8)
    assert checked(Net([*(Feed(i) for i in range(3)), narrow, *(Feed(i) for i in range(4, 7))])) == 3
    given = Feed(3)
    given.forward = lambda x: x  # type: ignore[method-assign]
    assert len(Repeats.of(Net([*(Feed(i) for i in range(3)), given])).dropped) == 0


def test_layers_that_compute_by_their_number_are_all_traced() -> None:
    net = Net(OfItsNumber(i) for i in range(6))
    assert checked(net) == 3  # alike to look at; their roles are not
    found = fxpeft.roles(net, {"x": torch.ones(2, 3, 8)})
    assert [f"layers.{i}.p" in found for i in range(6)] == [False, False, True, True, True, True]


def test_a_forward_that_asks_for_each_layer_by_number_is_traced_whole() -> None:
    assert checked(Net((Feed(i) for i in range(6)), by_number=True)) == 3


def test_lists_inside_of_layers() -> None:
    class Mixture(Feed):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.experts = nn.ModuleList(Feed(i) for i in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for expert in self.experts:
                x = x + expert(x)
            return super().forward(x)

    net = Net(Mixture(i) for i in range(5))
    assert checked(net) == 2 + 3 * 2
    assert len(fxpeft.roles(net, {"x": torch.ones(2, 3, 8)})) == 5 * (2 + 5 * 2)


def test_the_model_and_its_adapters_stay_as_they_are() -> None:
    net = Net(Feed(i) for i in range(6))
    inputs = {"x": torch.ones(2, 3, 8)}
    bare = fxpeft.roles(net, inputs)
    fxpeft.add_adapter(net, fxpeft.LoraConfig(r=2, target_modules=["p"]))
    assert fxpeft.roles(net, inputs) == bare
    assert [name for name, _ in net.layers.named_children()] == list("012345")
    assert fxpeft.loaded_adapters(net) == ["default"]
