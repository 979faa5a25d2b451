"""A net of repeated blocks whose sizes equal no rank, batch or length, and adapters in its slots: to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from adapter_files import add
from closeness import assert_close
from torch import Tensor, nn

import fxpeft

MAX_RANK = 8
TARGETS = ["query", "value", "out"]
CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"r": 1, "lora_alpha": 3, "target_modules": ["query"]},
    "five": {"r": 5, "lora_alpha": 7, "target_modules": ["query", "out"], "rank_pattern": {"1.query": 2}},
    "rslora": {"r": 3, "lora_alpha": 4, "target_modules": ["value"], "use_rslora": True},
    "full": {"r": MAX_RANK, "lora_alpha": 5, "target_modules": TARGETS},
}


class Block(nn.Module):
    """Three linear modules, two of which read one input, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(17, 19), nn.Linear(17, 19)
        self.out = nn.Linear(19, 17)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and gives ``[batch, length, 17]``."""
        return x + self.out(torch.softmax(self.query(x), -1) * self.value(x))


class Net(nn.Module):
    """A list of blocks, as transformers and diffusers have them."""

    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Takes and gives ``[batch, length, 17]``."""
        for block in self.blocks:
            x = block(x)
        return x


def net(block: Callable[[], nn.Module] = Block, count: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(block, count).eval()


def inputs(batch: int = 3, length: int = 4) -> Tensor:
    return torch.randn(batch, length, 17, generator=torch.Generator().manual_seed(100 * batch + length))


def with_adapters(model: Net, configs: Mapping[str, Mapping[str, Any]] = CONFIGS) -> Net:
    """The model with all of them, the first one active."""
    for seed, (name, config) in enumerate(configs.items()):
        add(model, fxpeft.LoraConfig(**config), name, seed)
    fxpeft.set_adapter(model, next(iter(configs)))
    return model


def prepared(block: Callable[[], nn.Module] = Block, **settings: Any) -> Net:
    """A net with slots and all adapters."""
    model = with_adapters(net(block))
    fxpeft.prepare_hotswap(model, MAX_RANK, **{"targets": TARGETS, **settings})
    return model


@torch.no_grad()
def outputs(x: Tensor, configs: Mapping[str, Mapping[str, Any]] = CONFIGS) -> dict[str, Tensor]:
    """What each adapter gives in its own training subgraph, eager, and what none gives."""
    model = with_adapters(net(), configs)
    found = {}
    for name in configs:
        fxpeft.set_adapter(model, name)
        found[name] = model(x)
    fxpeft.disable_adapters(model)
    bare: Tensor = model(x)
    assert all((each - bare).abs().max() > 0.01 for each in found.values())
    return found | {"off": bare}


@torch.no_grad()
def check_swaps(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Through every adapter and back, off between them, two together, and a scale, against training subgraphs."""
    wanted = outputs(x)
    for name in [*CONFIGS, *reversed(CONFIGS)]:
        fxpeft.set_adapter(model, name)
        assert_close(call(x), wanted[name], message=f"{name}: ")
        with fxpeft.disabled(model):
            assert_close(call(x), wanted["off"], message="off: ")
    reference = with_adapters(net())
    for each in (model, reference):
        fxpeft.set_scale(each, "rslora", -0.3)
        fxpeft.set_adapter(each, ["five", "rslora"])
    assert_close(call(x), reference(x), message="two at once: ")
    fxpeft.set_scale(model, "rslora", 1.0)
    fxpeft.set_adapter(model, "one")
