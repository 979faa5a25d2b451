"""Tensors that the library makes are ordinary ones, in whatever mode it is called: they are trained and written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from adapter_files import save_each
from closeness import assert_close
from tiny import logits, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fxpeft

IDS = token_ids()
CONFIGS = {
    "a": fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    "b": fxpeft.LoraConfig(r=5, lora_alpha=3, target_modules=["v_proj"], use_dora=True),
}
MODES = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_each(tiny_llama, CONFIGS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def outputs(folders: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, folder in folders.items():
        model = tiny_llama()
        fxpeft.load_adapter(model, folder)
        found[name] = logits(model)
    return found


def prepare(model: nn.Module) -> None:
    fxpeft.prepare_hotswap(
        model, 8, targets=["q_proj", "up_proj", "v_proj"], methods=["lora", "dora"], modules_to_save=["lm_head"]
    )


def check_ordinary(model: nn.Module) -> None:
    made = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_inference()]
    assert made == []


@pytest.mark.parametrize("where", ["prepare", "load", "both"])
def test_swaps_outside_of_the_mode_that_slots_were_made_in(
    where: str, folders: dict[str, str], outputs: dict[str, Tensor]
) -> None:
    model = tiny_llama()
    with torch.inference_mode() if where != "load" else nullcontext():
        prepare(model)
    with torch.inference_mode() if where != "prepare" else nullcontext():
        for name, folder in folders.items():
            fxpeft.load_adapter(model, folder, name)
            assert_close(logits(model), outputs[name])
    check_ordinary(model)
    for name in ("a", "b", "a"):
        fxpeft.set_adapter(model, name)
        assert fxpeft.active_adapters(model) == [name]
        assert_close(logits(model), outputs[name])


def test_swaps_inside_and_outside_of_inference_mode_compile_once_each(
    folders: dict[str, str], outputs: dict[str, Tensor]
) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    prepare(model)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    modes: list[Any] = [torch.no_grad, torch.inference_mode]
    for mode in modes:
        with mode():
            compiled(IDS)
    graphs = counter.frame_count
    for swap in modes:
        for run in modes:
            for name in ("b", "a"):
                with swap():
                    fxpeft.set_adapter(model, name)
                with run():
                    assert_close(compiled(IDS).logits, outputs[name])
    assert counter.frame_count == graphs


def test_moving_slots_inside_of_inference_mode(folders: dict[str, str], outputs: dict[str, Tensor]) -> None:
    model = tiny_llama()
    prepare(model)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    with torch.inference_mode():
        model.double()
        model.float()
    fxpeft.set_adapter(model, "a")
    assert_close(logits(model), outputs["a"])


ENTRIES: dict[str, Callable[[nn.Module, dict[str, str]], object]] = {
    "add": lambda m, f: fxpeft.add_adapter(m, fxpeft.LoraConfig(r=2, target_modules=["k_proj"]), "new"),
    "load": lambda m, f: fxpeft.load_adapter(m, f["a"], "new", trainable=True),
    "blend": lambda m, f: fxpeft.add_weighted_adapter(m, ["a"], [0.7], "new", "svd"),
    "convert": lambda m, f: fxpeft.convert(m, "a", new_name="new"),
    "apply": lambda m, f: fxpeft.apply(fxpeft.plan(m, fxpeft.LoraConfig(r=2, target_modules=["k_proj"])), m, "new"),
    "fold": lambda m, f: (fxpeft.fold(m, "a"), fxpeft.unfold(m)),
    "slots and back": lambda m, f: (prepare(m), fxpeft.release_hotswap(m)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_made_in_inference_mode_trains_outside(entry: str, folders: dict[str, str]) -> None:
    model = tiny_llama()
    fxpeft.load_adapter(model, folders["a"], "a", trainable=True)
    with torch.inference_mode():
        ENTRIES[entry](model, folders)
        assert torch.is_inference_mode_enabled()
    check_ordinary(model)
    name = fxpeft.active_adapters(model)[0]
    for adapter in fxpeft.adapter_state_dict(model, name).values():
        assert not adapter.is_inference()
    parameters = [p for n, p in model.named_parameters() if f".{name}." in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    before = logits(model)
    model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    assert not torch.equal(logits(model), before)


@MODES
def test_modes_are_as_they_were_after_every_verb(mode: Any, folders: dict[str, str]) -> None:
    for verb in ENTRIES.values():
        model = tiny_llama()
        with mode():
            state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            fxpeft.load_adapter(model, folders["a"], "a")
            verb(model, folders)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
            fxpeft.remove(model)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
        assert torch.is_grad_enabled()


def test_folding_a_base_of_inference_tensors(folders: dict[str, str], outputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model = tiny_llama()
        fxpeft.load_adapter(model, folders["a"], "a")
        fxpeft.fold(model)
        assert_close(model(IDS).logits, outputs["a"])
    fxpeft.unfold(model)
    assert_close(logits(model), outputs["a"])
