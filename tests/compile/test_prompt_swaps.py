"""Prompts of the declared length swap in one compiled graph, in forwards and in the steps of generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor
from transformers import CompileConfig

import fxpeft
from fxpeft.testing import count_graphs, no_recompiles

IDS = token_ids()
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
VIRTUAL = 4
CONFIGS: dict[str, Any] = {
    "prompt": lambda n: fxpeft.PromptTuningConfig(num_virtual_tokens=n),
    "encoded": lambda n: fxpeft.PromptEncoderConfig(num_virtual_tokens=n, encoder_hidden_size=9),
    "prefix": lambda n: fxpeft.PrefixTuningConfig(num_virtual_tokens=n),
    "task": lambda n: fxpeft.MultitaskPromptTuningConfig(num_virtual_tokens=n),
    "context": lambda n: fxpeft.CPTConfig(cpt_token_ids=[5, 9, 3, 21][:n], opt_projection_format_epsilon=30.0),
    "projected": lambda n: fxpeft.PrefixTuningConfig(num_virtual_tokens=n, prefix_projection=True),
    "cartridge": lambda n: fxpeft.CartridgeConfig(num_virtual_tokens=n),
}
KINDS = {"prompt_tuning": ("prompt", "encoded", "task", "context"), "cartridge": ("prefix", "projected", "cartridge")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = tiny_llama()
        fxpeft.add_adapter(model, config(VIRTUAL), name)
        randomise(model.adapters.get_submodule(name).parameters(), seed=seed, scale=0.7)
        made[name] = str(tmp_path_factory.mktemp(name))
        fxpeft.save_adapter(model, made[name])
    return made


@torch.no_grad()
def alone(folder: str) -> Tensor:
    """What an adapter gives in its training form, eager."""
    model = tiny_llama()
    fxpeft.load_adapter(model, folder)
    return model(**INPUTS).logits


@pytest.mark.parametrize("method", KINDS)
def test_forwards_recompile_nothing(method: str, folders: dict[str, str]) -> None:
    torch._dynamo.reset()
    one, two, *others = (folders[name] for name in KINDS[method])
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, methods=(method,), num_virtual_tokens=VIRTUAL)
    fxpeft.load_adapter(model, one, "one")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    wanted = [alone(one), alone(two)]
    assert not torch.allclose(*wanted, atol=1e-2)
    with torch.no_grad():
        compiled(**INPUTS)
        with no_recompiles(warm=True) as counted:
            for folder in (one, two, one):
                fxpeft.hotswap(compiled, folder)
                assert_close(compiled(**INPUTS).logits, wanted[folder == two])
            fxpeft.load_adapter(compiled, two, "two")
            assert_close(compiled(**INPUTS).logits, wanted[1])
            fxpeft.set_adapter(compiled, "one")
            assert_close(compiled(**INPUTS).logits, wanted[0])
            for folder in others:
                fxpeft.hotswap(compiled, folder)
                assert_close(compiled(**INPUTS).logits, alone(folder))
    assert counted.graphs == 0


def test_what_a_swap_must_not_be_is_seen(folders: dict[str, str]) -> None:
    """Without slots the same swap gives the model another forward, which does recompile."""
    torch._dynamo.reset()
    model = tiny_llama()
    fxpeft.load_adapter(model, folders["prompt"], "one")
    fxpeft.load_adapter(model, folders["prefix"], "two")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), count_graphs() as counted:
        compiled(**INPUTS)
        fxpeft.set_adapter(compiled, "one")
        compiled(**INPUTS)
    assert counted.graphs == 2


@pytest.mark.parametrize("method", KINDS)
def test_steps_of_generate_recompile_nothing(method: str, folders: dict[str, str]) -> None:
    """The first step makes room for the prompt, eager as in transformers; all others are one full graph."""
    torch._dynamo.reset()
    names = KINDS[method]
    compile_config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compile_config._compile_all_devices = True
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    wanted = {}
    for name in names:
        plain = tiny_llama()
        fxpeft.load_adapter(plain, folders[name])
        wanted[name] = plain.generate(**INPUTS, **options)
    assert len({tuple(tokens.flatten().tolist()) for tokens in wanted.values()}) > 1
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, methods=(method,), num_virtual_tokens=VIRTUAL)
    graphs = []
    for name in (*names, names[0]):
        with count_graphs() as counted:
            if graphs:
                fxpeft.hotswap(model, folders[name])
            else:
                fxpeft.load_adapter(model, folders[name])
            found = model.generate(**INPUTS, **options, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(found, wanted[name])
        assert not counted.breaks
        graphs.append(counted.graphs)
    assert graphs == [1, *[0] * len(names)]
