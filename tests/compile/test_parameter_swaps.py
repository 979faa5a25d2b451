"""No swap of an adapter of experts recompiles, and adapters that are off cost nothing where the graph is folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from adapter_files import load_each, save
from closeness import assert_close
from families import DECODER, MOE, mixtral
from swap_walks import swap_in_place, walk
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule

import fxpeft
from fxpeft.testing import assert_swaps_clean

MAX_RANK = 24
UP, DOWN, GATE = "experts.gate_up_proj", "experts.down_proj", "gate.weight"

# name -> config; ranks 1 to MAX_RANK, with and without modules
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"r": MAX_RANK, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": [UP, DOWN, GATE]},
    "one": {"r": 1, "lora_alpha": 2, "target_modules": [], "target_parameters": [DOWN]},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "target_parameters": [UP, DOWN], "use_rslora": True,
        "rank_pattern": {"gate_up_proj": 17}, "alpha_pattern": {r"layers\.1\..*down_proj": 1},
    },
    "dense": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"]},
}  # fmt: skip


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=20, head_dim=8, **MOE)
    return tf.Qwen3MoeForCausalLM(config).eval()


def ids() -> Tensor:
    return torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))


Saved = tuple[dict[str, str], dict[str, Tensor]]


def saved(build: Callable[[], Any], factory: pytest.TempPathFactory) -> Saved:
    """Each adapter's folder, and what it gives in its own training subgraph, eager; ``off``: the bare model."""
    folders, expected = {}, {"off": build()(ids()).logits.detach()}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = build()
        folders[name] = save(model, fxpeft.LoraConfig(**config), factory.mktemp(name), seed)
        expected[name] = model(ids()).logits.detach()
    return folders, expected


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(mixtral, tmp_path_factory)


def prepared(folders: dict[str, str], rank: Any = "dynamic") -> Any:
    model = mixtral()
    fxpeft.prepare_hotswap(
        model, MAX_RANK, targets=["q_proj", "v_proj", "o_proj"], target_parameters=[UP, DOWN, GATE], rank=rank
    )
    return load_each(model, folders)


@pytest.mark.parametrize("way", ["dynamic", "static", "inductor", "batched_mm"])
def test_one_graph_serves_every_adapter(way: str, experts: Saved) -> None:
    torch._dynamo.reset()
    folders, expected = experts
    model = prepared(folders, "static" if way == "static" else "dynamic")
    if way == "batched_mm":
        model.set_experts_implementation(way)
    counter = CompileCounterWithBackend("inductor" if way == "inductor" else "aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    walk(model, ADAPTERS, lambda: compiled(ids()).logits, expected)
    assert counter.frame_count == 1


def test_one_graph_per_layer_kind(experts: Saved) -> None:
    torch._dynamo.reset()
    folders, expected = experts
    model, counter = prepared(folders), CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    walk(model, ADAPTERS, lambda: model(ids(), use_cache=False).logits, expected)
    assert counter.frame_count == 1  # both layers run the same graph


def test_the_whole_matrix_on_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> None:
    folders, _ = saved(qwen3_moe, tmp_path_factory)
    report = assert_swaps_clean(
        qwen3_moe(), list(folders.values()), {"input_ids": ids(), "use_cache": False}, max_rank=MAX_RANK,
        compile_options={"backend": "aot_eager"},
    )  # fmt: skip
    assert report.graphs == 1


def test_the_check_can_fail(experts: Saved) -> None:
    """Without slots a swap to another rank is another graph, and error_on_recompile says so."""
    torch._dynamo.reset()
    model = mixtral()
    for name in ("one", "full"):
        fxpeft.load_adapter(model, experts[0][name], name)
    compiled = torch.compile(model, backend="eager")
    fxpeft.set_adapter(model, "one")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(ids())
        fxpeft.set_adapter(model, "full")
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(ids())


def test_idle_slots_leave_the_graph(experts: Saved) -> None:
    torch._dynamo.reset()
    folders, expected = experts
    model, graphs = prepared(folders), list[GraphModule]()
    fxpeft.disable_adapters(model)

    def keep(graph_module: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    compiled = fxpeft.compile(model, inner=keep, fullgraph=True)
    with torch.no_grad():
        compiled(ids())
    updates = [sum(node.target is torch.baddbmm for node in graph.graph.nodes) for graph in graphs]
    fxpeft.enable_adapters(model)
    assert updates == [0, 6]  # the folded graph, and the one with slots: three parameters in each of two layers
    walk(model, ADAPTERS, lambda: compiled(ids()).logits, expected)


def test_no_slot_moves(experts: Saved) -> None:
    folders, _ = experts
    model = prepared(folders)
    assert any(name.endswith("slot.gate_up_proj.a") for name in swap_in_place(model, ADAPTERS, folders["one"]))


def test_training_compiles_once_a_rank(experts: Saved) -> None:
    """Compiled and eager gradients agree, and new values need no new graph."""
    torch._dynamo.reset()
    found = []
    for compile_it in (False, True):
        model = mixtral()
        fxpeft.load_adapter(model, experts[0]["patterns"], trainable=True)
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, backend=counter, fullgraph=True) if compile_it else model
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                call(ids(), labels=ids()).loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter -= 0.1 * parameter.grad
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert counter.frame_count == compile_it
    assert found[0].keys() == found[1].keys()
    assert any("down_proj" in name for name in found[0])
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, message=name)
