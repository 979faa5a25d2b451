"""The lock around compiled models and generate: one full graph, no recompile, and held at run time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from swapping import NAMES, close, is_free, lock_of, slow_swaps, threads
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import fxpeft
from fxpeft.errors import LockError

IDS = token_ids()


def loaded(**options: Any) -> LlamaForCausalLM:
    """Prepared, with three adapters that give different tokens."""
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "down_proj", "lm_head"], **options)
    for seed, name in enumerate(NAMES):
        config = fxpeft.LoraConfig(
            r=2 + seed, lora_alpha=5, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
        )
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed, 1.0)
        fxpeft.set_scale(model, name, 1.0)  # lowers it again, from its new values
    fxpeft.set_adapter(model, "a")
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def each(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    found = []
    for name in NAMES:
        fxpeft.set_adapter(model, name)
        found.append(call())
    return found


WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "model.compile": lambda model, backend: model.compile(backend=backend, fullgraph=True) or model,
    "forward": lambda model, backend: torch.compile(model.forward, backend=backend, fullgraph=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("root", ["transformers", "torch"])
def test_a_compiled_call_holds_the_lock_and_is_one_graph(way: str, root: str) -> None:
    torch._dynamo.reset()
    if root == "transformers":
        model: nn.Module = loaded()
        inputs = IDS
    else:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
        fxpeft.prepare_hotswap(model, 4)
        inputs = torch.ones(2, 6)
    held: list[int] = []
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            held.append(len(lock_of(model).readers))
            return graph(*args)

        return run

    with torch.no_grad():
        called = WAYS[way](model, backend)
        for _ in range(3):
            called(inputs)
    assert held == [1, 1, 1]
    assert len(graphs) == 1
    assert is_free(model)


@pytest.mark.slow
def test_no_mixture_in_inductors_code_and_no_recompile() -> None:
    torch._dynamo.reset()
    model = loaded()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        allowed = each(model, lambda: output(compiled))
        wrong: list[bool] = []
        with slow_swaps(), threads(*[lambda: wrong.append(not close(output(compiled), *allowed))] * 3):
            for i in range(60):
                fxpeft.set_adapter(model, NAMES[i % 3])
    assert sum(wrong) == 0
    assert len(wrong) > 20
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("known_processor")
def test_inductors_cache_is_hit_by_another_prepared_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=False):
        for expected in ("fxgraph_cache_miss", "fxgraph_cache_hit"):
            torch._dynamo.reset()
            counters.clear()
            output(torch.compile(loaded(), fullgraph=True))
            assert counters["inductor"][expected] == 1


def test_layers_compiled_one_by_one_hold_it_too() -> None:
    torch._dynamo.reset()
    model = loaded()
    wanted = output(model)
    counter = CompileCounterWithBackend("eager")
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=counter)
    assert_close(output(model), wanted, terms=1, size=1.0)
    assert counter.frame_count == 1
    held = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: held.append(len(lock_of(model).readers)))
    hidden = torch.randn(1, 3, 32)
    positions = torch.arange(3)[None]
    with torch.no_grad():
        model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, positions))
    assert held == [1]


# --- generate ---


class Meddling(LogitsProcessor):
    """Lets others swap after every token."""

    def __init__(self, swap: Callable[[], None]) -> None:
        self.swap = swap

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.swap()
        return scores


def tokens(model: Any, swap: Callable[[], None] = lambda: None) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None,
        logits_processor=LogitsProcessorList([Meddling(swap)]),
    )  # fmt: skip


@pytest.mark.parametrize("held", [True, False])
def test_generate_holds_by_default_and_lets_swaps_between_tokens_where_asked(held: bool) -> None:
    model = loaded() if held else loaded(hold_generate=False)
    allowed = each(model, lambda: tokens(model))
    assert not torch.equal(allowed[0], allowed[1])
    fxpeft.set_adapter(model, "a")
    swaps: list[threading.Thread] = []

    def swap() -> None:
        name = NAMES[(len(swaps) + 1) % 3]
        swaps.append(threading.Thread(target=fxpeft.set_adapter, args=(model, name)))
        swaps[-1].start()
        swaps[-1].join(0.05 if held else 30)

    found = tokens(model, swap)
    for thread in swaps:
        thread.join(30)
    assert len(swaps) == 8
    assert torch.equal(found, allowed[0]) == held
    assert is_free(model)


def test_a_swap_in_its_own_generate_says_how_to_have_it() -> None:
    model = loaded()
    with pytest.raises(LockError, match="hold_generate=False"):
        tokens(model, lambda: fxpeft.set_adapter(model, "b"))
    assert is_free(model)
    free = loaded(hold_generate=False)
    allowed = each(free, lambda: tokens(free))
    fxpeft.set_adapter(free, "a")
    found = tokens(free, lambda: fxpeft.set_adapter(free, "b"))
    assert not torch.equal(found, allowed[0])
