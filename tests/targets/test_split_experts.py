"""Experts in training: the update is applied to the rows of each expert, and nothing as large as the stack is made."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from adapter_files import add
from closeness import assert_close
from families import mixtral
from tiny import token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxpeft
from fxpeft import LoraConfig
from fxpeft.passes.live import split
from fxpeft.testing import count_graphs

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STACKS = {(3, 96, 32), (3, 32, 48), (3, 32, 96), (3, 48, 32)}


def adapted(way: str, dtype: torch.dtype = torch.float32) -> Any:
    model = mixtral(experts_implementation=way).to(dtype).requires_grad_(False)
    add(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=EXPERTS))
    return model.train()


def step(model: Any, call: Any = None) -> dict[str, Tensor]:
    """The loss and the adapter's gradients."""
    model.zero_grad()
    loss = (model if call is None else call)(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def summed() -> Any:
    """A block in which forwards are given the sum, as those that aren't known."""
    return patch.object(split, "why_whole", lambda module: "the test says so")


class Stacks(TorchDispatchMode):
    """Counts what is made of the shape of a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in STACKS and not function.is_view:
                self.made.append(str(function))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_outputs_and_gradients_are_those_of_the_sum(way: str, dtype: torch.dtype) -> None:
    model = adapted(way, dtype)
    found = step(model)
    with summed():
        wanted = step(model)
    assert found.keys() == wanted.keys()
    assert len(found) == 1 + 2 * (2 + 4)
    for name, value in wanted.items():
        if dtype == torch.float32:
            assert_close(found[name], value, message=name)
        else:  # the sum is rounded to bfloat16, and the products with its parts aren't
            assert float((found[name] - value).norm()) < 0.05 * float(value.norm()), name
    with Stacks() as few:
        step(model)
    with summed(), Stacks() as many:
        step(model)
    assert not few.made
    assert many.made
    model.gradient_checkpointing_enable()
    for name, value in step(model).items():
        assert torch.equal(value, found[name]), name


def test_compiled_by_inductor_it_is_one_graph() -> None:
    model = adapted("grouped_mm")
    eager = step(model)
    with count_graphs() as count:
        compiled = step(model, torch.compile(model, fullgraph=True))
    assert (count.graphs, count.breaks) == (1, ())
    for name, value in eager.items():
        assert_close(compiled[name], value, message=name)


def test_torchs_own_grouped_product_is_given_the_sum_where_it_is_compiled() -> None:
    """Transformers calls it in bfloat16 alone; Dynamo asks none of its arguments what they stand for."""
    model = adapted("grouped_mm", torch.bfloat16)
    with summed():
        eager = step(model)
    compiled = step(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, value in eager.items():
        assert float((compiled[name] - value).norm()) < 0.05 * float(value.norm()), name


def test_the_plan_says_how_the_update_meets_the_input() -> None:
    config = LoraConfig(r=3, target_modules=[], target_parameters=[*EXPERTS, "gate.weight"])
    model = mixtral()
    plan = fxpeft.plan(model, config)
    up, gate = (
        next(s for s in plan.sites if s.name.endswith(end)) for end in ("0.mlp.experts.gate_up_proj", "gate.weight")
    )
    assert up.update.startswith("split, the update is applied to the rows that go to each expert")
    assert gate.update.startswith("whole weight, the update is added to all of it once a call: it is one matrix")
    assert (up.kept, up.kept_input) == (4 * 3, 4 * 32)
    assert any(line.startswith("model.layers.{0-1}.mlp.experts.gate_up_proj") for line in str(plan).splitlines()[-2:])
    half = next(s for s in fxpeft.plan(model.bfloat16(), config, roles=False).sites if s.name == up.name).update
    assert half.startswith(up.update)
    assert "; compiled it is the whole weight" in half
    model.config._experts_implementation = "sonicmoe"
    other = next(s for s in fxpeft.plan(model, config, roles=False).sites if s.name == up.name)
    assert other.update.startswith("whole weight, the update is added to all of it once a call: experts_implementation")
