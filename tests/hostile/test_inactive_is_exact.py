"""A slot that holds nothing adds nothing, whatever comes in: 0 * inf is NaN, and off means off."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft import IA3Config, LoraConfig

Rank = Literal["dynamic", "static"]


class Net(nn.Module):
    """Sites that each see the input itself, so that an infinity in it is one in the bare output."""

    def __init__(self, line: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 6)
        self.line = nn.Conv1d(3, 4, 1) if line else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 3, 5]``."""
        return torch.cat([site(x).flatten(1) for site in (self.line, self.up, self.down)], 1)


def net(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs).eval().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """A finite row, and rows with inf, -inf, NaN and both infinities."""
    x = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(1))
    x[1, 0, 2], x[2, 1, 3], x[3, 2, 0] = torch.inf, -torch.inf, torch.nan
    x[4, 0, 1], x[4, 1, 1] = torch.inf, -torch.inf
    return x.to(dtype)


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to the bit, NaN equal to NaN."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def add(model: nn.Module, name: str, config: Any) -> None:
    fxpeft.add_adapter(model, config, name)
    tensors = {key: value.clone() for key, value in fxpeft.adapter_state_dict(model, name).items()}
    randomise(tensors.values(), 3)
    if fxpeft.adapters.state.is_prepared(model):
        fxpeft.hotswap(model, tensors, name)
    else:
        for key, value in fxpeft.adapter_state_dict(model, name).items():
            value.copy_(tensors[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("methods", [("lora",), ("lora", "lora_bias", "ia3")], ids=len)
@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_off_is_the_bare_model_for_inputs_that_are_not_finite(
    rank: Rank, methods: tuple[str, ...], dtype: torch.dtype
) -> None:
    model, x = net(dtype), inputs(dtype)
    with torch.no_grad():
        bare = model(x)
        assert bare.isinf().any()
        fxpeft.prepare_hotswap(model, 4, targets=["line", "up", "down"], methods=methods, rank=rank)
        same(model(x), bare)
        add(model, "a", LoraConfig(r=3, lora_alpha=5, target_modules=["line", "up", "down"]))
        assert not torch.equal(model(x)[0], bare[0])
        with fxpeft.disabled(model):
            same(model(x), bare)
        fxpeft.set_scale(model, "a", 0.0)
        same(model(x), bare)
        fxpeft.delete_adapter(model, "a")
        same(model(x), bare)


@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_ranks_and_sites_that_an_adapter_lacks_add_nothing(rank: Rank) -> None:
    """Rank 1 is padded to 2, ``up`` has no adapter at all, and ``down`` fewer ranks than are active."""
    model, live, x = net(), net(), inputs()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["line", "down"], rank_pattern={"down": 1})
    one = LoraConfig(r=1, lora_alpha=3, target_modules=["down"])
    with torch.no_grad():
        fxpeft.prepare_hotswap(model, 8, targets=["line", "up", "down"], rank=rank)
        for name, each in (("a", config), ("one", one)):
            add(model, name, each)
            add(live, name, each)
            found, wanted = model(x), live(x)
            assert wanted[1:].isinf().any()
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.isinf(), wanted.isinf())
            assert_close(found, wanted)


@pytest.mark.parametrize("rank", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["inductor", "fxpeft"])
def test_off_is_exact_in_compiled_code_and_one_graph_serves_all(rank: Rank, backend: str) -> None:
    model, x = net(line=False), inputs()
    with torch.no_grad():
        bare = torch.compile(net(line=False), backend=backend)(x)
    assert bare.isinf().any()
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        fxpeft.prepare_hotswap(model, 6, targets=["up", "down"], methods=("lora", "ia3"), rank=rank)
        run = torch.compile(model, backend=backend)
        same(run(x), bare)
        add(model, "a", LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]))
        changed = run(x)
        assert not torch.equal(changed[0], bare[0])
        add(model, "one", LoraConfig(r=1, lora_alpha=5, target_modules=["down"]))
        assert_close(run(x), model(x))
        add(model, "gain", IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]))
        assert not torch.equal(run(x)[0], bare[0])
        for name in ("a", "one", "gain"):
            fxpeft.set_adapter(model, name)
            with fxpeft.disabled(model):
                same(run(x), bare)
