"""Folds that are refused with the reason, before anything changed, and their neighbours that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from picture import assert_same, picture
from test_folding import IDS, LORA, add
from tiny import logits, randomise, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxpeft
from fxpeft import AdapterError, IA3Config, LoraConfig


def test_safe_refuses_nan_and_names_the_weight() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    fxpeft.adapter_state_dict(model)[key][2, 1] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"NaN or infinity in\n  model\.layers\.1\.self_attn\.v_proj\.weight\n"):
        fxpeft.fold(model, safe=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".adapters." not in k)
    assert fxpeft.active_adapters(model) == ["a"]
    fxpeft.fold(model)
    assert model.model.layers[1].self_attn.v_proj.weight.isnan().any()


def test_an_error_while_writing_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    add(model, "a", 1)
    before, running = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    for failing in ("exchange", "switch"):
        with monkeypatch.context() as patch:
            if failing == "exchange":
                copies, copy_ = [], Tensor.copy_

                def breaks(self: Tensor, *args: Any, copies: list[int] = copies, copy_: Any = copy_) -> Tensor:
                    copies.append(1)
                    if len(copies) == 4:
                        raise MemoryError
                    return copy_(self, *args)

                patch.setattr(Tensor, "copy_", breaks)
            else:
                calls, switch = [], fxpeft.transform.writing.switch

                def once(*args: Any, calls: list[int] = calls, switch: Any = switch) -> None:
                    calls.append(1)
                    if len(calls) == 1:
                        raise MemoryError
                    switch(*args)

                patch.setattr(fxpeft.transform.writing, "switch", once)
            with pytest.raises(MemoryError):
                fxpeft.fold(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(logits(model), running)
        assert fxpeft.folded_adapters(model) == []


def test_tied_weights_are_refused_or_right() -> None:
    model = tiny_gpt2()
    add(model, "a", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["wte", "c_attn"]))
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match=r"tied.*\n  transformer\.wte\.weight = lm_head\.weight\n.*untie them first"):
        fxpeft.fold(model)
    assert_same(before, picture(model, IDS))
    add(model, "head", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match="tied"):
        fxpeft.fold(model)
    fxpeft.set_adapter(model, "a")
    running = logits(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    fxpeft.fold(model)
    assert_close(logits(model), running)


def test_tied_weights_that_change_alike_stay_tied() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    net, x = Twins(), torch.randn(4, 5)
    bare = net.one.weight.detach().clone()
    fxpeft.add_adapter(net, LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two"]), "a")
    own = fxpeft.adapter_state_dict(net)
    randomise(own.values(), 1)
    with pytest.raises(AdapterError, match=r"one\.weight = two\.weight"):
        fxpeft.fold(net)
    for key in own:
        own[key].copy_(own[key.replace(".two.", ".one.")])
    for keep in ("original", "delta"):
        running = net(x)
        fxpeft.fold(net, keep=keep)
        assert net.one.weight is net.two.weight
        assert_close(net(x), running)
        fxpeft.unfold(net)
        assert torch.allclose(net.one.weight, bare, atol=0 if keep == "original" else 1e-6)


def test_weights_that_overlap_in_memory_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    flat = torch.randn(18)
    net[0].weight, net[1].weight = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[6:].view(3, 4))
    fxpeft.add_adapter(net, LoraConfig(r=2, target_modules=["0"]), "a")
    with pytest.raises(AdapterError, match=r"0\.weight = 1\.weight"):
        fxpeft.fold(net)
    net[1].weight = nn.Parameter(torch.randn(3, 4))
    fxpeft.fold(net)


def test_a_bias_that_the_base_lacks() -> None:
    model = tiny_llama()
    add(model, "a", 1, LoraConfig(**LORA, lora_bias=True))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: the adapter adds a bias and the base has"):
        fxpeft.fold(model)
    for key, value in fxpeft.adapter_state_dict(model).items():
        if key.endswith("lora_B.bias"):
            value.zero_()
    running = logits(model)
    fxpeft.fold(model)
    assert_close(logits(model), running)


class Doubled(nn.Linear):
    """A linear that scales its product, where torch.fx can see it, or not."""

    hidden = False

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden and float(x.sum()) > 1e9:  # control flow on data: no trace
            return x
        return nn.functional.linear(x, self.weight, self.bias) * 2 + self.weight.shape[0]


class ReadsTwice(nn.Linear):
    """A linear that looks at its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) / self.weight.abs().max()


class Quantised(nn.Linear):
    """A linear with integer weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = nn.Parameter(torch.ones(self.weight.shape, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


def fits(module: nn.Module, x: Tensor, **config: Any) -> None:
    """A fold of one module computes what its adapter did."""
    net = nn.Sequential(module).eval()
    add(net, "a", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **config))
    running = net(x)
    fxpeft.fold(net)
    assert_close(net(x), running)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), "grouped convolution"),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), "pads with zeros"),
    "reflected point": (lambda: nn.Conv1d(4, 6, 1, padding=1, padding_mode="replicate"), "pads with zeros"),
    "dilated same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), "without dilation"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "rescales"),
    "opaque": (lambda: type("Opaque", (Doubled,), {"hidden": True})(5, 3), "can't look into Opaque.forward"),
    "reads twice": (lambda: ReadsTwice(5, 3), "for something else"),
    "quantised": (lambda: Quantised(5, 3), r"int8.*dequantise|can't look into"),
    "offloaded": (lambda: nn.Linear(5, 3, device="meta"), "offloaded"),
    "parametrised": (
        lambda: parametrize.register_parametrization(nn.Linear(5, 3), "weight", nn.Tanh()),
        "computed when it is read|can't look into",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(build: Callable[[], nn.Module], reason: str) -> None:
    net = nn.Sequential(build())
    fxpeft.add_adapter(net, LoraConfig(r=2, lora_alpha=3, target_modules="0"), "a")
    bound = type(net[0])
    with pytest.raises(AdapterError, match=rf"a can't be folded .* nothing was changed\.\n  0: .*({reason})"):
        fxpeft.fold(net)
    assert type(net[0]) is bound
    assert fxpeft.active_adapters(net) == ["a"]


def test_allowed() -> None:
    """The neighbours of what is refused."""
    fits(nn.Conv1d(4, 6, 3, padding_mode="circular"), torch.randn(2, 4, 8))
    fits(nn.Conv2d(4, 6, 1, padding="same", dilation=2), torch.randn(2, 4, 5, 6))
    fits(nn.Conv2d(4, 6, 3, padding=2, dilation=2), torch.randn(2, 4, 7, 6))
    fits(nn.Embedding(9, 4, padding_idx=0), torch.arange(9))
    fits(Doubled(5, 3), torch.randn(2, 5))
    fits(nn.Linear(5, 3).double(), torch.randn(2, 5, dtype=torch.double))
    fits(nn.Conv1d(4, 6, 3, padding=1, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.double), use_dora=True)


@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=["output", "input"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_gains_of_grouped_and_padded_convolutions_fold(feedforward: list[str], padding_mode: Any) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode=padding_mode))
    x, bare = torch.randn(2, 4, 5, 6), copy.deepcopy(net)
    add(net, "a", 1, IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    running = net(x)
    fxpeft.fold(net)
    assert_close(net(x), running, terms=1)
    assert float((running - bare(x)).abs().max()) > 0.1
