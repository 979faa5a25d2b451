"""A rewrite enters the bodies of higher-order operators: branches, regions, checkpoints, maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import assert_close
from test_rewrite import ROWS, call, text
from tiny import Layer, randomise
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.utils.checkpoint import checkpoint

import fxpeft
from fxpeft import LoraConfig
from fxpeft.programs import eject, rewrite


class Nested(nn.Module):
    """Two layers in a checkpoint each, a branch, a checkpoint in a branch, a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.yes, self.no, self.out = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        y = torch.cond(x.sum() > 0, lambda t: self.yes(t), lambda t: self.no(t).relu(), (x,))
        return self.out(y)


class Region(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Regions(nn.Module):
    """Layers that share one body: ``invoke_subgraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList([Region(), Region(), Region()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class NoGrad(nn.Module):
    """``wrap_with_set_grad_enabled`` in training IR."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x).relu()
        return self.out(h)


class Mapped(nn.Module):
    """``map``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        from functorch.experimental.control_flow import map as map_over

        return self.out(map_over(lambda row: self.first(row).tanh(), x))


def captured(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return torch._dynamo.export(model)(x).graph_module


@pytest.mark.parametrize("sign", [1, -1], ids=["yes", "no"])
@pytest.mark.parametrize(
    ("cls", "capture", "targets", "bodies"),
    [
        (Nested, captured, ["up", "down", "yes", "no", "out"], 4),
        (Nested, captured, ["layers.1.up", "no"], 4),
        (Nested, export, ["up", "yes", "no", "out"], 2),
        (Regions, captured, ["up", "out"], 2),
        (Regions, captured, ["layers.1.down"], 2),
        (Regions, captured, ["layers.2.down"], 2),
        (Mapped, export, ["first", "out"], 1),
        (NoGrad, export, ["first", "out"], 0),
    ],
    ids=["checkpoint+cond", "one of each", "exported cond", "regions", "one region", "last region", "map", "no_grad"],
)  # fmt: skip
def test_bodies_are_entered(cls: type[nn.Module], capture: Any, targets: list[str], bodies: int, sign: int) -> None:
    torch.manual_seed(0)
    model = cls()
    x = ROWS * sign
    program = capture(model, x if capture is captured else (x,))
    before = text(program)
    live = copy.deepcopy(model)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets)
    fxpeft.add_adapter(live, config)
    tensors = fxpeft.adapter_state_dict(live)
    randomise(tensors.values(), scale=0.6)
    rewritten = rewrite(program, config, state_dict=tensors)
    wanted = live(x)
    assert (wanted - model(x)).abs().max() > 0.02
    assert_close(call(rewritten, x), wanted)
    graph_module = rewritten.graph_module if isinstance(rewritten, ExportedProgram) else rewritten
    inner = [m for n, m in graph_module.named_modules() if n and isinstance(m, torch.fx.GraphModule)]
    assert len(inner) >= bodies
    assert rewrite(rewritten, config) is rewritten
    ejected = eject(rewritten)
    assert text(ejected) == before
    assert torch.equal(call(ejected, x), call(program, x))
