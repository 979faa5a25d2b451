"""Flex attention in captured programs: projections around it, and targets inside of its score and mask functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import fxpeft
from fxpeft import AdapterError, LoraConfig, Slots
from fxpeft.passes.rewrite.subgraphs import calls, closed
from fxpeft.programs import eject, rewrite

LENGTH, HEADS = 5, 2
X = torch.randn(3, LENGTH, 6, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Attention whose score is changed by slopes (a buffer), a look-up of distances, or a linear of the score.

    Args:
        kind: ``slopes``, ``table``, ``linear`` or ``mask``: what the score, or the mask, is made with.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(6, HEADS * 8, bias=bias) for bias in (True, False, True))
        self.o = nn.Linear(HEADS * 8, 6)
        self.table, self.mix = nn.Embedding(2 * LENGTH - 1, HEADS), nn.Linear(3, HEADS)
        self.register_buffer("slopes", torch.tensor([0.3, -0.2]))

    def score(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if self.kind == "table":
            return score + self.table(query - key + LENGTH - 1)[head]
        if self.kind == "linear":
            return score + self.mix(torch.stack([score, score * score, query - key + 0.0]))[head]
        return score + self.slopes[head] * (query - key)

    def mask(self) -> BlockMask | None:
        if self.kind != "mask":
            return None
        slopes = self.slopes

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) | (slopes[head] > 0)

        return create_block_mask(near, None, HEADS, LENGTH, LENGTH, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, length, 6]``."""
        q, k, v = (f(x).unflatten(-1, (HEADS, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended: Any = flex_attention(q, k, v, score_mod=self.score, block_mask=self.mask())
        return self.o(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attention(kind: str) -> Attention:
    torch.manual_seed(0)
    return Attention(kind).eval()


CAPTURES: dict[str, Callable[[nn.Module], Any]] = {
    "export": lambda m: export(m, (X,)),
    "inference IR": lambda m: export(m, (X,)).run_decompositions(),
    "strict": lambda m: export(m, (X,), strict=True),
    "dynamo": lambda m: torch._dynamo.export(m)(X).graph_module,
}


def call(program: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        output: Any = (program.module() if isinstance(program, ExportedProgram) else program)(x)
    return output[0] if isinstance(output, list | tuple) else output


def captured(kind: str, how: str) -> Any:
    """A program; FlexAttention has no backward on the CPU, so nothing may need a gradient."""
    with torch.no_grad():
        return CAPTURES[how](attention(kind).requires_grad_(False))


def adapted(kind: str, config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    live = attention(kind)
    fxpeft.add_adapter(live, config)
    tensors = fxpeft.adapter_state_dict(live)
    randomise((v for k, v in tensors.items() if "magnitude" not in k), scale=0.6)
    return live, tensors


def text(program: Any) -> tuple[str, ...]:
    root = program.graph_module if isinstance(program, ExportedProgram) else program
    bodies = [m.code for m in root.modules() if isinstance(m, GraphModule)]
    return str(program.graph), *bodies


CASES: list[tuple[str, str, list[str], bool]] = [
    *(("slopes", how, ["q", "k", "v", "o"], False) for how in CAPTURES),
    *(("table", how, ["q", "table"], False) for how in CAPTURES),
    *(("linear", how, ["v", "mix"], False) for how in CAPTURES),
    ("mask", "export", ["q", "v"], False),
    ("mask", "dynamo", ["k", "o"], False),
    ("linear", "export", ["mix"], True),
    ("table", "dynamo", ["table", "o"], True),
]


@pytest.mark.parametrize(("kind", "how", "targets", "dora"), CASES)
def test_targets_around_and_inside_of_flex_attention(kind: str, how: str, targets: list[str], dora: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora, alpha_pattern={targets[0]: 2})
    program, (live, tensors) = captured(kind, how), adapted(kind, config)
    before, wanted = text(program), call(live)
    assert (wanted - call(program)).abs().max() > 0.02
    rewritten = rewrite(program, config, state_dict=tensors)
    assert_close(call(rewritten), wanted)
    assert rewrite(rewritten, config) is rewritten
    ejected = eject(rewritten)
    assert text(ejected) == before
    assert torch.equal(call(ejected), call(program))


def test_each_target_of_a_body_counts() -> None:
    """What the cases above would miss if the body's adapter changed nothing."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["v", "mix"])
    live, tensors = adapted("linear", config)
    for key, value in tensors.items():
        if "mix" in key:
            value.data.zero_()
    without = rewrite(captured("linear", "export"), config, state_dict=tensors)
    wanted = call(adapted("linear", config)[0])
    assert (call(without) - wanted).abs().max() > 0.02
    assert_close(call(without), call(live))


def test_static_slots_inside_of_a_score() -> None:
    live, _ = adapted("linear", LoraConfig(r=3, lora_alpha=5, target_modules=["q", "mix"]))
    program = captured("linear", "export")
    runner = rewrite(program, Slots(["q", "mix"], max_rank=4)).module()
    assert_close(call(runner), call(program), terms=1, size=1.0)
    fxpeft.prepare_hotswap(live, 4)
    buffers = dict(runner.named_buffers())
    for site in ("q", "mix"):
        for name in "abd":
            buffers[f"slot.{site}.{name}"].copy_(getattr(live.get_submodule(site).slot, name))
    assert_close(call(runner), call(live))


def test_slots_of_a_live_model_fold_inside_of_a_score() -> None:
    torch._dynamo.reset()
    model = attention("linear").requires_grad_(False)
    bare = call(model)
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k", "mix"]))
    randomise(fxpeft.adapter_state_dict(model).values(), scale=0.6)
    fxpeft.prepare_hotswap(model, 4, rank="static")
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = fxpeft.compile(model, inner=inner, passes=("fold_inactive", "group", "clean"), fullgraph=True)
    for on in (True, False, True):
        fxpeft.enable_adapters(model) if on else fxpeft.disable_adapters(model)
        wanted = call(model)
        assert torch.allclose(wanted, bare, rtol=0, atol=1e-6) is not on
        assert_close(call(compiled), wanted)
    # in the score, where each call is one row: without the slot's two sums, and with them
    sums = [sum(n.target == "sum" for c in calls(g) for b in c.bodies() for n in b.graph.nodes) for g in graphs]
    assert sums == [0, 2]


# --- bodies that can't be entered ---


def hidden(kind: str = "linear") -> GraphModule:
    """A program whose flex attention is called in a form that no version of torch captures today."""
    gm = captured(kind, "dynamo")
    assert not closed(gm)
    (node,) = {c.node for c in calls(gm)}
    node.kwargs = {"score_mod_other_buffers": node.args[7], "mask_mod_other_buffers": node.args[8]}
    node.args = node.args[:7]
    gm.recompile()
    return gm


def test_targets_where_no_rewrite_reaches_are_refused() -> None:
    program = hidden()
    assert_close(call(program), call(attention("linear")), terms=1, size=1.0)
    assert not calls(program)
    for adapter in (
        LoraConfig(r=2, target_modules=["mix"]), LoraConfig(r=2, target_modules=["v", "mix"]),
        LoraConfig(r=2, target_modules=r"v|mi."), Slots(["v", "mix"]),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=r"(?s)mix: is used in a body of flex_attention that can't be entered"):
            rewrite(program, adapter)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["v", "mix"], exclude_modules=["mix"])
    live, tensors = adapted("linear", config)
    assert_close(call(rewrite(program, config, state_dict=tensors)), call(live))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["v", "q"])
    assert call(rewrite(hidden("slopes"), config)).shape == X.shape  # no target is in that body
