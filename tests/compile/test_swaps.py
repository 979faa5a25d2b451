"""No swap recompiles: ranks, scales, targets, on and off, several adapters, in every way of compiling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adapter_files import load_each, save_each
from closeness import assert_close
from swap_walks import swap_in_place, walk
from tiny import tiny_llama
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaForCausalLM

import fxpeft

MAX_RANK = 8
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> config; ranks 1 to MAX_RANK, subsets and supersets of each other's targets, patterns
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"r": MAX_RANK, "lora_alpha": 5, "target_modules": ALL},
    "one": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]},
    "two": {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 3, "lora_alpha": 4, "target_modules": ["k_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "o_proj"],
        "rank_pattern": {"q_proj": 7, r"layers\.1\..*\.o_proj": 1}, "alpha_pattern": {"up_proj": 1},
    },
    "embedding": {"r": 5, "lora_alpha": 2, "target_modules": ["embed_tokens", "gate_proj"]},
    "head": {"r": 6, "lora_alpha": 9, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each adapter, saved by fxpeft from its training layout."""
    configs = {name: fxpeft.LoraConfig(**config) for name, config in ADAPTERS.items()}
    return save_each(tiny_llama, configs, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(folders: dict[str, str], ids: Tensor) -> dict[str, Tensor]:
    """What each adapter gives in its own training subgraph, freshly loaded, eager."""
    outputs = {}
    for name, folder in folders.items():
        model = tiny_llama()
        fxpeft.load_adapter(model, folder)
        outputs[name] = model(ids).logits.detach()
    outputs["off"] = tiny_llama()(ids).logits.detach()
    return outputs


def prepared(folders: dict[str, str], rank: Any = "dynamic") -> LlamaForCausalLM:
    model = tiny_llama()
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=[*ALL, "embed_tokens"], modules_to_save=["lm_head"], rank=rank)
    return load_each(model, folders)


@contextmanager
def never_again() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "backend"), [("dynamic", "inductor"), ("static", "aot_eager")])
def test_one_graph_serves_every_adapter(
    rank: str, backend: str, folders: dict[str, str], ids: Tensor, expected: dict[str, Tensor]
) -> None:
    torch._dynamo.reset()
    reference, model = tiny_llama(), prepared(folders, rank)
    for name in ("two", "rslora", "one"):
        fxpeft.load_adapter(reference, folders[name], name)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with never_again():
        walk(model, ADAPTERS, lambda: compiled(ids).logits, expected)
        for names, scale in ((["two"], 0.7), (["two", "rslora"], 1.0), (["one", "rslora", "two"], -0.4)):
            for m in (model, reference):
                fxpeft.set_scale(m, "two", scale)
                fxpeft.set_adapter(m, names)
            assert_close(compiled(ids).logits, reference(ids).logits)
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_cuda_graphs_see_every_swap(
    rank: str, folders: dict[str, str], ids: Tensor, expected: dict[str, Tensor]
) -> None:
    torch._dynamo.reset()
    model = prepared(folders, rank).cuda()
    compiled, inputs = torch.compile(model, mode="reduce-overhead", fullgraph=True), ids.cuda()
    before = {n: b.data_ptr() for n, b in model.named_buffers()}
    with never_again():
        compiled(inputs)
        for name in (*ADAPTERS, *ADAPTERS):  # the second round replays what the first recorded
            fxpeft.set_adapter(model, name)
            assert_close(compiled(inputs).logits.cpu(), expected[name])
    assert {n: b.data_ptr() for n, b in model.named_buffers()} == before


def test_one_graph_per_layer_kind(folders: dict[str, str], ids: Tensor, expected: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    model = prepared(folders)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with never_again():
        walk(model, ADAPTERS, lambda: model(ids, use_cache=False).logits, expected)
    assert counter.frame_count == 1  # both layers run the same graph


@pytest.mark.slow
def test_a_second_shape_collides_with_ranks_and_costs_one_graph(
    folders: dict[str, str], ids: Tensor, expected: dict[str, Tensor]
) -> None:
    torch._dynamo.reset()
    model = prepared(folders)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(ids)
    graphs = counter.frame_count  # 2: torch 2.13 starts over, to specialise floats
    with never_again():
        walk(model, ADAPTERS, lambda: compiled(ids).logits, expected)
        for length in (2, 3, MAX_RANK):  # as long as some adapter's rank
            batch = ids.repeat(1, 2)[:, :length].contiguous()
            for name in ("two", "full", "rslora"):
                fxpeft.set_adapter(model, name)
                assert_close(compiled(batch).logits, model(batch).logits)
    assert counter.frame_count == graphs


def test_train_and_eval_need_one_graph_each(folders: dict[str, str], ids: Tensor) -> None:
    torch._dynamo.reset()
    model = prepared(folders)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            compiled(ids)
    with never_again():
        for name in ("one", "full"):
            fxpeft.set_adapter(model, name)
            outputs = [compiled(ids).logits for training in (True, False) if model.train(training) is model]
            torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_generate_with_a_static_cache(folders: dict[str, str], ids: Tensor) -> None:
    torch._dynamo.reset()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = {}
    for name in ("two", "full", "one"):
        reference = tiny_llama()
        fxpeft.load_adapter(reference, folders[name])
        wanted[name] = reference.generate(ids, **settings)
    model = prepared(folders)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    fxpeft.set_adapter(model, "two")
    model.generate(ids, cache_implementation="static", **settings)
    graphs = counter.frame_count
    with never_again():
        for name, tokens in wanted.items():
            fxpeft.set_adapter(model, name)
            assert torch.equal(model.generate(ids, cache_implementation="static", **settings), tokens)
    assert counter.frame_count == graphs  # the prefill's and the decode step's


def test_addresses_never_change(folders: dict[str, str]) -> None:
    """What CUDA graphs rely on."""
    model = prepared(folders)
    assert any(name.endswith("slot.a") for name in swap_in_place(model, ADAPTERS, folders["one"]))


def test_the_check_can_fail(folders: dict[str, str], ids: Tensor) -> None:
    """Without slots a swap to another rank is another graph, and error_on_recompile says so."""
    torch._dynamo.reset()
    model = tiny_llama()
    for name in ("two", "full"):
        fxpeft.load_adapter(model, folders[name], name)
    compiled = torch.compile(model, backend="eager")
    fxpeft.set_adapter(model, "two")
    with never_again():
        compiled(ids)
        fxpeft.set_adapter(model, "full")
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(ids)


def test_frozen_inductor_is_refused() -> None:
    with torch._inductor.config.patch(freezing=True), pytest.raises(fxpeft.AdapterError, match="freezing"):
        fxpeft.prepare_hotswap(tiny_llama(), MAX_RANK)
