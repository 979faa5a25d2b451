"""An adapter's name is in no code: compiled models take adapters of any name, and train and export as before."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_llama, token_ids, two_linears
from torch import nn

import fxpeft
from fxpeft.passes.container import Container
from fxpeft.passes.live import forward_text
from fxpeft.testing import count_graphs, no_recompiles

pytestmark = pytest.mark.usefixtures("fresh_graphs")
CONFIG = {"r": 3, "lora_alpha": 7, "target_modules": ["0", "2"], "rank_pattern": {"2": 2}}


def add(model: nn.Module, name: str, seed: int) -> None:
    """An adapter whose update is not zero."""
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**CONFIG), name)
    randomise(fxpeft.adapter_state_dict(model, name).values(), seed)


def test_a_live_compiled_model_takes_fresh_names_without_compiling() -> None:
    model, x = two_linears(), torch.randn(4, 5)
    compiled = torch.compile(model, fullgraph=True)
    add(model, "user-0", 0)
    compiled(x)
    with no_recompiles(warm=True):
        for number in range(1, 6):
            add(model, f"user-{number}", number)
            fxpeft.delete_adapter(model, f"user-{number - 1}")
            assert_close(compiled(x), model(x))
    assert "user" not in forward_text(model[0])


def test_compiled_training_reaches_the_named_parameters() -> None:
    model, x = two_linears(), torch.randn(4, 5)
    add(model, "first", 1)
    add(model, "second", 2)
    fxpeft.set_adapter(model, ["second", "first"])
    eager = copy.deepcopy(model)
    torch.compile(model, fullgraph=True)(x).pow(2).sum().backward()
    eager(x).pow(2).sum().backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert names == [f"{site}.adapters.{name}.lora_{k}" for site in "02" for name in ("first", "second") for k in "AB"]
    for name in names:
        own, other = model.get_parameter(name).grad, eager.get_parameter(name).grad
        assert float(own.abs().max()) > 0
        assert_close(own, other)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_parameters_have_their_names(strict: bool) -> None:
    model, x = two_linears(), torch.randn(4, 5)
    add(model, "my-own", 1)
    program = torch.export.export(model, (x,), strict=strict)
    assert {"0.adapters.my-own.lora_A", "2.adapters.my-own.lora_B"} <= set(program.state_dict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace_names_them_too() -> None:
    model, x = two_linears(), torch.randn(4, 5)
    add(model, "mine", 1)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


def test_two_active_adapters_of_one_site_are_told_apart() -> None:
    model, x = two_linears(), torch.randn(4, 5)
    add(model, "a", 1)
    alone = {"a": model(x)}
    add(model, "b", 2)
    alone["b"] = model(x)
    fxpeft.set_adapter(model, ["b", "a"])
    both = model(x)
    for name in ("a", "b"):
        fxpeft.set_adapter(model, name)
        torch.testing.assert_close(model(x), alone[name], rtol=0, atol=0)
        assert not torch.allclose(both, alone[name])
    fxpeft.delete_adapter(model, "a")
    torch.testing.assert_close(model(x), alone["b"], rtol=0, atol=0)


def test_an_adapter_that_goes_is_freed() -> None:
    model = two_linears()
    add(model, "a", 1)
    part = model.get_submodule("0.adapters.a")
    container = model.get_submodule("0.adapters")
    fxpeft.delete_adapter(model, "a")
    assert not [v for v in vars(container).values() if v is part]
    del container
    gc.collect()
    assert not [o for o in gc.get_referrers(part) if isinstance(o, dict) and "_modules" in o]


def test_what_stands_in_the_place_of_a_child_is_active() -> None:
    """A wrapper that is set over it, and a replica's child, as ``torch.nn.parallel.replicate`` sets them."""
    container, first, second = Container(), nn.Linear(2, 2), nn.Linear(2, 2)
    container.add_module("a", first)
    container.show([first])
    replica = container._replicate_for_data_parallel()
    replica.a = second
    assert replica._active0 is second
    assert container._active0 is first
    assert container.a is first
    assert [n for n, _ in container.named_parameters()] == ["a.weight", "a.bias"]


def test_fresh_names_in_a_compiled_prepared_model(tmp_path: Path) -> None:
    model, ids = tiny_llama().eval(), token_ids()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "down_proj"])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(ids)
        with count_graphs() as counted:
            for number in range(4):
                fxpeft.add_adapter(
                    model, fxpeft.LoraConfig(r=1 + number, lora_alpha=3, target_modules=["q_proj"]), f"user-{number}"
                )
                randomise(fxpeft.adapter_state_dict(model).values(), number)
                fxpeft.set_adapter(model, f"user-{number}")
                assert_close(compiled(ids).logits, model(ids).logits)
    assert counted.graphs == 0
