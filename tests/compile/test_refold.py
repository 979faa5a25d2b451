"""A compiled graph of the bare model goes on serving while adapters are folded into its weights."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft
from fxpeft import AdaLoraConfig, IA3Config, LoraConfig
from fxpeft.testing import no_recompiles

IDS = token_ids()
ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "embed_tokens"], rank_pattern={"q_proj": 5}),
    "dora": LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["o_proj"]),
    "head": LoraConfig(r=2, lora_alpha=5, target_modules=["up_proj"], modules_to_save=["lm_head"]),
}


def loaded() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with every adapter, and what each computes unfolded."""
    model = tiny_llama()
    expected = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
        with torch.no_grad():
            expected[name] = model(IDS).logits
    return model, expected


def test_folded_adapters_swap_in_the_bare_models_graph() -> None:
    torch._dynamo.reset()
    model, expected = loaded()
    with torch.no_grad():
        expected["bare"] = tiny_llama()(IDS).logits
    fxpeft.refold(model, "lora")
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    bare = CompileCounterWithBackend("eager")
    with torch.no_grad(), no_recompiles() as counted:
        for name in (*ADAPTERS, "bare", *reversed(ADAPTERS), "dora"):
            fxpeft.refold(model, [] if name == "bare" else name)
            found = compiled(IDS).logits
            assert_close(found, expected[name])
        assert counted.graphs == 1
    assert counter.frame_count == 1
    with torch.no_grad():
        torch.compile(tiny_llama(), backend=bare, fullgraph=True)(IDS)
    nodes = [len(c.graphs[0].graph.nodes) for c in (counter, bare)]
    assert nodes[0] == nodes[1]  # nothing is left of the adapters


def test_a_graph_compiled_before_the_first_adapter_serves_it() -> None:
    torch._dynamo.reset()
    model = tiny_llama().requires_grad_(False)  # adapters freeze the base, and Dynamo guards on that
    with torch.no_grad(), no_recompiles() as counted:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        before = compiled(IDS).logits
        fxpeft.add_adapter(model, ADAPTERS["lora"], "a")
        randomise(fxpeft.adapter_state_dict(model).values())
        running = model(IDS).logits
        fxpeft.fold(model)
        assert_close(compiled(IDS).logits, running)
        fxpeft.remove(model)
        assert torch.equal(compiled(IDS).logits, before)
    assert counted.graphs == 1


def test_an_adapter_in_the_forward_does_recompile() -> None:
    """What the tests above would miss if they could not fail."""
    torch._dynamo.reset()
    model, _ = loaded()
    fxpeft.refold(model, "lora")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), no_recompiles():
        compiled(IDS)
        fxpeft.unfold(model)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(IDS)
