"""Generic code asks a method by what it does: one that is neither of sites nor of prompts needs no edit of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.registry import METHODS
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.targets.kinds import Kind

ROOT = Path(__file__).parents[2]
OF_PROMPTS = {"PromptMethod", "PromptPlan", "PromptLearningConfig", "PromptAdapter", "whole"}
THEIR_OWN = {
    f"fxpeft/{name}.py"
    for name in (
        "methods/prompts",
        "methods/prompt_inputs",
        "methods/prompt_tuning",
        "methods/p_tuning",
        "methods/prefix_tuning",
        "methods/prefixes",
        "methods/multitask_prompt_tuning",
        "methods/cpt",
        "methods/cartridge",
        "serving/prompts",
        "integrations/trl",  # TRL asks for PEFT's class of that name
    )
}


def asked(source: str) -> list[tuple[int, str]]:
    """Lines that name what is of prompts alone: an import, a class, an attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        # a local variable may be called whole, a method's attribute no more
        found += [
            (node.lineno, name)
            for name in names
            if name in OF_PROMPTS and not (name == "whole" and isinstance(node, ast.Name))
        ]
    return found


def test_generic_code_knows_no_family_of_methods() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "fxpeft").rglob("*.py")}
    assert files.keys() >= THEIR_OWN
    lines = [
        f"{name}:{line}: {what}"
        for name, path in files.items()
        if name not in THEIR_OWN
        for line, what in asked(path.read_text("utf-8"))
    ]
    assert not lines, "\n".join(lines)


def test_the_check_can_fail() -> None:
    assert asked("if isinstance(method, PromptMethod):\n    pass") == [(1, "PromptMethod")]
    assert asked("from fxpeft.methods.prompts import PromptPlan as P") == [(1, "PromptPlan")]
    assert asked("method_of(config).whole") == [(1, "whole")]
    assert not asked("whole = 1")


@dataclass
class SteerConfig(AdapterConfig):
    strength: float = 2.0

    peft_type: ClassVar[str] = "STEER"


def steer(inputs: dict[str, Any], vector: Tensor, strength: float) -> dict[str, Any]:
    return {**inputs, "x": inputs["x"] + strength * vector}


class Steer(Method[SteerConfig]):
    """A trained vector that is added to what goes into the model: no target, and no prompt."""

    name = "steer"
    peft_type = "STEER"
    config_class = SteerConfig
    targeted = False
    feeds = True
    unlowered = "steering adds a vector to the model's input"
    alone = "steering"

    def find(self, model: nn.Module, config: SteerConfig) -> tuple[SteerConfig, dict[str, SitePlan]]:
        width = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
        return config, {"": SitePlan(Kind(width, 0), 0, 1.0)}

    def plan(self, config: SteerConfig, site: str, kind: Kind) -> SitePlan:
        raise NotImplementedError

    def shapes(self, config: SteerConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {"vector": (plan.kind.in_features,)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"vector": "steer_vector"}

    def initialise(self, config: SteerConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        parameters["vector"].zero_()

    def rewrite(self, name: str, config: SteerConfig, site: SiteAdapter) -> Feed:
        operands = {f"{name}.vector": ("vector", site.vector)}
        return Feed(f"steer:{name}", steer, operands, constants={"strength": config.strength})

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        raise NotImplementedError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x).tanh())
        return found


X = torch.linspace(-1, 1, 18).view(3, 6)
LORA = fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    method = Steer()
    fxpeft.register(method)
    yield
    METHODS.remove(method)


def steered() -> Net:
    net = Net()
    fxpeft.add_adapter(net, SteerConfig(strength=1.5))
    randomise(fxpeft.adapter_state_dict(net).values(), 3)
    return net


def test_it_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    net = steered()
    vector = fxpeft.adapter_state_dict(net)["base_model.model.steer_vector"]
    torch.testing.assert_close(net(X), Net()(X + 1.5 * vector))
    net(X).square().mean().backward()
    assert [p.grad is not None for p in net.parameters() if p.requires_grad] == [True]
    fxpeft.save_adapter(net, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.steer_vector"]
    again = Net()
    fxpeft.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), net(X))
    fxpeft.remove(again)
    torch.testing.assert_close(again(X), Net()(X))


def test_it_works_beside_a_lora_and_not_beside_another() -> None:
    net = steered()
    alone = net(X)
    fxpeft.add_adapter(net, LORA, "lora")
    randomise(fxpeft.adapter_state_dict(net, "lora").values(), 4)
    fxpeft.set_adapter(net, ["default", "lora"])
    vector = fxpeft.adapter_state_dict(net, "default")["base_model.model.steer_vector"]
    both = net(X)
    fxpeft.set_adapter(net, "lora")
    torch.testing.assert_close(both, net(X + 1.5 * vector))
    assert (both - alone).abs().max() > 0.01
    fxpeft.add_adapter(net, SteerConfig(), "more")
    with pytest.raises(fxpeft.AdapterError, match="only one steering can be active at a time, found default, more"):
        fxpeft.set_adapter(net, ["default", "more"])


def test_it_has_a_plan() -> None:
    made = fxpeft.plan(Net(), SteerConfig(), roles=False)
    assert (made.parameters, made.flops, made.skipped) == (6, 0, ())


def test_what_it_cannot_do_is_said() -> None:
    net = steered()
    with pytest.raises(
        fxpeft.AdapterError, match="default: steering adds a vector to the model's input and changes no"
    ):
        fxpeft.fold(net)
    with pytest.raises(fxpeft.AdapterError, match="'default': steering adds a vector to the model's input, which no L"):
        fxpeft.convert(net, "default")
    with pytest.raises(fxpeft.AdapterError, match="steer prepares the inputs of a model's forward"):
        fxpeft.rewrite(torch.fx.symbolic_trace(Net()), SteerConfig())
    with pytest.raises(fxpeft.AdapterError, match="steer: has no slot: steering adds a vector"):
        fxpeft.prepare_hotswap(net, 4)
    with pytest.raises(fxpeft.AdapterError, match=r"methods: expected a sequence of some of .*, lora, .*, found steer"):
        fxpeft.prepare_hotswap(Net(), 4, methods=("lora", "steer"))  # nothing would read it
    torch.testing.assert_close(net(X), steered()(X))
