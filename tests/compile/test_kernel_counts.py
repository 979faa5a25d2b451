"""What a slot adds to what Inductor makes, counted, at one row and at more: a regression shows without a clock."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from swap_walks import walk
from tiny import randomise
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

import fxpeft
from fxpeft.passes.torch_private import graph_counter

SITES = ("q", "k", "v", "o", "gate", "up", "down")
TRIED = torch.__version__.startswith("2.13")


class Block(nn.Module):
    """A layer's seven linears as a decoder has them; nowhere square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.gate, self.up, self.down = nn.Linear(24, 56), nn.Linear(24, 56), nn.Linear(56, 24)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, 24]`` to the same."""
        h = F.rms_norm(x, (24,))
        x = x + self.o((self.q(h) * self.k(h)).softmax(-1) * self.v(h))
        h = F.rms_norm(x, (24,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Counts(NamedTuple):
    """What a step calls: a library's products, functions that Inductor made, and the kernels in these."""

    products: int
    functions: int
    kernels: int

    def more_than(self, other: Counts) -> Counts:
        """The difference."""
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


def counts(model: nn.Module, x: Tensor) -> Counts:
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    uncompiled = mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *_: None)  # to count is enough
    with torch.no_grad(), uncompiled, torch._inductor.config.patch(force_disable_caches=True):
        _, sources = run_and_get_code(compiled, x)
    (source,) = sources
    called = source[source.index("def call(") :]
    products, functions = re.findall(r"extern_kernels\.\w+\(", called), re.findall(r"cpp_fused_\w*\(", called)
    return Counts(len(products), len(functions), metrics.generated_kernel_count)


@pytest.mark.usefixtures("known_processor")
@pytest.mark.parametrize(
    ("tokens", "added"),
    [(1, Counts(products=0, functions=2, kernels=14)), (64, Counts(14, 7, 7)), (512, Counts(14, 7, 7))],
)
def test_what_seven_slots_add(tokens: int, added: Counts) -> None:
    """One row: two sums a site, most in a function that is there anyway. More: two products a site, and the scale."""
    x, model = torch.randn(1, tokens, 24), Block().eval()
    bare = counts(model, x)
    fxpeft.prepare_hotswap(model, 8, targets=SITES)
    found = counts(model, x).more_than(bare)
    assert found == added if TRIED else all(f <= a + 7 for f, a in zip(found, added, strict=True)), found
    assert bare.products >= 7 or tokens == 1


def adapters(net: Callable[[], nn.Module], targets: Sequence[str], root: Path) -> dict[str, nn.Module]:
    """Of ranks 1 to 8, of all sites and of some, of other scales; each in a model of its own, as it is trained."""
    made = {}
    for number, (rank, own) in enumerate(((3, targets), (8, targets[:1]), (1, targets[-2:]))):
        config = fxpeft.LoraConfig(
            r=rank, lora_alpha=5 + number, target_modules=[*own], rank_pattern={own[0]: 1 + rank % 8}
        )
        model = net().eval()
        fxpeft.add_adapter(model, config)
        values = fxpeft.adapter_state_dict(model)
        randomise(values.values(), seed=number)
        with torch.no_grad():
            for value in values.values():
                value.copy_(value.to(next(model.parameters()).dtype))  # as a slot of that dtype holds it
        fxpeft.save_adapter(model, root / f"a{number}")
        made[f"a{number}"] = model
    return made


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [("dynamic", torch.float32), ("dynamic", torch.bfloat16), ("dynamic", torch.float16), ("static", torch.bfloat16)],
    ids=str,
)
def test_every_form_is_the_training_graph(
    dtype: torch.dtype, rank: Literal["dynamic", "static"], tmp_path: Path
) -> None:
    """One row, several and many, as they are called and compiled; the first compile of a length is the last."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(first=nn.Linear(24, 40), second=nn.Linear(40, 24))).to(dtype)

    trained, model, bare = adapters(net, ("first", "second"), tmp_path), net(), net()
    fxpeft.prepare_hotswap(model, 9, targets=["first", "second"], rank=rank)
    for name in trained:
        fxpeft.load_adapter(model, tmp_path / name, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 1, 24), (24,), (3, 24), (2, 2, 24), (1, 64, 24)):
        x = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            expected = {name: other(x) for name, other in trained.items()} | {"off": bare(x)}
            compiled(x)
        assert min(float((y - expected["off"]).abs().max()) for n, y in expected.items() if n != "off") > 0.05
        for call in (compiled, model):
            walk(model, trained, lambda call=call, x=x: call(x), expected)  # type: ignore[misc]


def test_a_batch_that_grows_compiles_as_it_did() -> None:
    """One row, and then a symbol of rows: the form asks nothing of it, so that every number of rows is one graph."""
    model = Block().eval()
    fxpeft.prepare_hotswap(model, 8, targets=SITES)
    torch._dynamo.reset()
    counter = graph_counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (1, 5, 2, 64):
            compiled(torch.randn(1, tokens, 24))
    assert counter.frame_count == 2
    torch._dynamo.reset()
