"""A slot computes its formula for every kind, at any rank; one that holds nothing is the base, to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from closeness import assert_close
from graphs import FORMS, IDS, chains, matched, program, snapshot
from tiny import randomise
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import EjectPass, InjectPass, Linear, Pipeline
from fxpeft.passes.meta import TARGET
from fxpeft.passes.slots.slot import FEATURES, LEAST, NEUTRAL, ActiveRank, Slot, slot, slot_of

KIND = Linear(6, 10)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def filled(kind: Any = KIND, ranks: int = 5, max_rank: int = 8, rank: ActiveRank | None = None, **options: Any) -> Slot:
    """A slot of which only the first ranks are not zero; gains are around one."""
    made = Slot(kind, max_rank, rank, **options)
    randomise(made.buffers(), seed=3)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name in ("a", "b", "d"):
                buffer[ranks:] = 0
            elif NEUTRAL[name]:
                buffer.add_(1)
    return made


def base_of(kind: Linear) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(kind.in_features, kind.out_features)


def called(made: Slot, base: nn.Module, x: Tensor) -> Tensor:
    operands = dict(made.named_buffers(recurse=False))
    with torch.no_grad():
        return slot(made.kind, base, x, rank=made.rank, **operands)


@pytest.mark.parametrize("features", [(), ("g_in",), ("g_out", "shift"), ("w1", "w2"), tuple(FEATURES)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False])
def test_computes_the_formula(features: tuple[str, ...], dynamic: bool) -> None:
    rank = ActiveRank(8) if dynamic else None
    if rank is not None:
        rank.set(5)
    made, base = filled(rank=rank, features=features), base_of(KIND)
    assert made.features == features
    gained = X * made.g_in if "g_in" in features else X
    if "rotation" in features:
        gained = gained + gained @ torch.block_diag(*made.rotation)
    wanted = base(gained) + ((gained @ made.a.T) * made.d) @ made.b
    wanted = wanted + gained @ torch.kron(made.w1, made.w2).T if "w1" in features else wanted
    wanted = wanted * made.g_out if "g_out" in features else wanted
    wanted = wanted + made.shift if "shift" in features else wanted
    assert_close(called(made, base, X), wanted.detach())
    assert float((wanted - base(X)).abs().max()) > 0.1


def test_only_the_ranks_in_use_are_computed() -> None:
    """What lies behind them, another adapter's say, is not read."""
    rank = ActiveRank(8)
    made, base = filled(ranks=8, rank=rank), base_of(KIND)
    for active in (2, 8, 3):
        assert rank.set(active) == active
        wanted = base(X) + ((X @ made.a[:active].T) * made.d[:active]) @ made.b[:active]
        assert_close(called(made, base, X), wanted.detach())
    assert rank.set(1) == rank.set(0) == LEAST  # a size of one would be a constant of the graph


@pytest.mark.parametrize("features", [(), tuple(FEATURES)], ids=str)
def test_one_that_holds_nothing_is_the_base(features: tuple[str, ...]) -> None:
    made, base = Slot(KIND, 4, None, features=features), base_of(KIND)
    assert torch.equal(called(made, base, X), base(X))
    assert not list(made.state_dict())
    assert not list(made.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_in_a_graph_beside_other_rewrites(form: str) -> None:
    """Every kind of site; ``up`` has a second user and ``down`` reads it. Eject finds the way back."""
    graph_module = matched(FORMS[form]())
    before, bare = snapshot(graph_module), graph_module(IDS)
    kinds = {TARGET.of(n).site: TARGET.of(n).kind for n in graph_module.graph.nodes if TARGET.has(n)}
    slots = {site: filled(kind, ranks=4) for site, kind in kinds.items()}
    carrier = torch.empty(4, 0)

    def injected(target: GraphModule, *given: Tensor) -> Tensor:
        rewrites = {site: [made.rewrite(*given)] for site, made in slots.items()}
        rewrites["up"] = [*chains(target, "up")["up"], *rewrites["up"]]
        return Pipeline([InjectPass(rewrites)])(target)(IDS)  # type: ignore[no-any-return]

    static = injected(matched(FORMS[form]()))
    assert_close(injected(graph_module, carrier), static)  # ranks that are zero, computed or not
    assert not torch.allclose(static, bare, atol=0.1)
    Pipeline([EjectPass()])(graph_module)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(IDS), bare)


def test_a_dtype_reaches_the_factors_and_not_the_scales() -> None:
    made = filled(features=tuple(FEATURES))
    values = {name: buffer.clone() for name, buffer in made.named_buffers()}
    made.to(torch.bfloat16)
    assert {name: b.dtype for name, b in made.named_buffers()} == {
        name: torch.bfloat16 if name in ("a", "b", "rotation", "w1", "w2") else torch.float32 for name in values
    }
    assert all(torch.equal(b, values[name].to(b.dtype)) for name, b in made.named_buffers())
    assert all(slot_of(b) is made for b in made.buffers())
    assert slot_of(values["a"]) is None


def test_back_from_the_meta_device_it_holds_nothing() -> None:
    made = filled(features=tuple(FEATURES)).to("meta").to_empty(device="cpu")
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, torch.full_like(buffer, NEUTRAL.get(name, 0))), name


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_its_own(how: str) -> None:
    made = filled(rank=ActiveRank(8))
    assert made.rank is not None
    made.rank.set(4)
    if how == "deepcopy":
        twin = copy.deepcopy(made)
    else:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    base = base_of(KIND)
    wanted = called(made, base, X)
    assert torch.equal(called(twin, base, X), wanted)
    twin.a.zero_()
    assert twin.rank.set(7) == 7
    assert torch.equal(called(made, base, X), wanted)
    assert slot_of(twin.a) is twin
    assert slot_of(made.a) is made


def test_what_it_shows() -> None:
    made = Slot(KIND, 8, ActiveRank(8), features=("shift", "g_in"))
    made.idle = True
    assert str(made) == "Slot(max_rank=8, rank=2, g_in, shift, idle)"
    assert program().up.in_features == KIND.in_features
