"""Products with stacks of matrices, on either side, picked or whole: matched, rewritten, unchanged, users, chains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import low_rank
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import EjectPass, InjectPass, MatchPass, Pipeline, Rewrite, Target, graph_text
from fxpeft.passes.meta import TARGET
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.targets.flow import flow_of
from fxpeft.passes.targets.operations.batched import Batched

EXPERTS = 3


class Experts(nn.Module):
    """Two stacks in a chain, the first with a second user, each on the right; then attention, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 5, 7) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 4, 7) / 3)  # transposed where it is used

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[experts, tokens, 5]``."""
        h = torch.bmm(x, self.up)
        y = torch.bmm(torch.tanh(h), self.down.transpose(1, 2))
        return torch.bmm(torch.bmm(y, y.transpose(1, 2)), y) + h.mean()


class Picked(Experts):
    """The stacks on the left, a matrix picked for each token, as transformers' ``batched_mm`` does it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 7, 5) / 3)
        self.register_buffer("ids", torch.tensor([2, 0, 0, 1, 2, 2, 0, 2, 1, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[11, 5]``."""
        h = torch.bmm(self.up[self.ids], x.unsqueeze(-1))
        y = torch.bmm(self.down[self.ids], torch.tanh(h)).squeeze(-1)
        return y + h.mean()


class Written(Experts):
    """As Python's operator, the stored order of both."""

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[experts, tokens, 5]``."""
        h = x @ self.up
        return torch.tanh(h) @ self.down.mT + h.mean()


MODULES: dict[str, tuple[type[Experts], tuple[int, ...]]] = {
    "right": (Experts, (EXPERTS, 6, 5)), "picked": (Picked, (11, 5)), "operator": (Written, (EXPERTS, 6, 5)),
}  # fmt: skip
FORMS: dict[str, Callable[[nn.Module, Tensor], GraphModule]] = {
    "functional": lambda module, x: torch.fx.symbolic_trace(module),
    "aten": lambda module, x: torch.export.export(module, (x,)).module(),
    "core aten": lambda module, x: torch.export.export(module, (x,)).run_decompositions().module(),
}
BOTH = pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in MODULES for f in FORMS if (n, f) not in {("operator", "functional"), ("operator", "core aten")}],
)


def built(name: str) -> tuple[Experts, Tensor]:
    torch.manual_seed(0)
    cls, shape = MODULES[name]
    return cls(), torch.randn(shape)


def captured(name: str, form: str) -> tuple[GraphModule, Experts, Tensor]:
    module, x = built(name)
    return FORMS[form](copy.deepcopy(module), x), module, x


def targets(graph_module: GraphModule) -> list[Target]:
    MatchPass(lambda site: True)(graph_module)
    return [TARGET.of(n) for n in graph_module.graph.nodes if TARGET.has(n)]  # type: ignore[misc]


@BOTH
def test_the_stacks_are_found_and_attention_is_not(name: str, form: str) -> None:
    graph_module, module, _ = captured(name, form)
    size = len(graph_module.graph.nodes)
    report = MatchPass(lambda site: True)(graph_module).report
    assert report.matched == ("up", "down")
    assert report.skipped == ()
    assert len(graph_module.graph.nodes) == size
    up, down = targets(graph_module)
    assert (up.kind.in_features, up.kind.out_features, up.kind.name) == (5, 7, "parameter[3]")
    assert (down.kind.in_features, down.kind.out_features, down.kind.leaf) == (7, 4, "down")
    assert isinstance(up.kind, Batched)
    assert up.kind.transposed == (tuple(module.up.shape) == (3, 5, 7))
    assert (up.input, up.kind.left) == ((1, True) if name == "picked" else (0, False))
    again = MatchPass(lambda site: True)(graph_module)
    assert not again.modified


@BOTH
def test_nothing_selected_changes_nothing(name: str, form: str) -> None:
    graph_module, _, x = captured(name, form)
    text = graph_text(graph_module)
    result = Pipeline([MatchPass(lambda site: False), InjectPass({"up": [adapter(Batched(5, 7, "up", 3))]})])
    assert result(graph_module) is graph_module
    assert graph_text(graph_module) == text
    assert flow_of(graph_module).number_of_nodes() > 0
    assert graph_module(x).shape[-1] == 4


def adapter(kind: Any, seed: int = 1, function: Callable[..., Any] = low_rank) -> Rewrite:
    """A LoRA of rank 2, B not zero, as PEFT lays it out."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=generator) * 0.3 for s in (kind.a_shape(2), kind.b_shape(2)))
    operands = {"mine.a": nn.Parameter(a), "mine.b": nn.Parameter(b), "mine.scale": torch.tensor(1.75)}
    return Rewrite("lora:mine", function, operands)


def through_update(kind: Any, base: Any, x: Tensor, *, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """What LoRA's own subgraph does, which also serves an A at the outputs."""
    return base(x) + kind.update(x, a, b, scale)  # type: ignore[no-any-return]


def updated(module: Experts, site: str, kind: Any, rewrite: Rewrite) -> None:
    """The same update written into the parameter, by the layout that a live module's update has."""
    a, b = rewrite.operands["mine.a"], rewrite.operands["mine.b"]
    parameter = module.get_parameter(site)
    with torch.no_grad():
        parameter += kind.delta(kind.ranks(a * 1.75), kind.rows(b))


@BOTH
@pytest.mark.parametrize("at_input", [True, False], ids=["A at the inputs", "A at the outputs"])
def test_the_rewrite_is_the_update_and_ejects(name: str, form: str, at_input: bool) -> None:
    graph_module, module, x = captured(name, form)
    text, before = graph_text(graph_module), module(x)
    rewrites = {}
    found = targets(graph_module)
    for seed, target in enumerate(found):
        assert isinstance(target.kind, Batched)
        kind = target.kind if at_input else target.kind.laid_out(not target.kind.transposed)
        assert kind.at_input == at_input
        for node in graph_module.graph.nodes:
            if TARGET.get(node) == target:
                TARGET.set(node, replace(target, kind=kind))
        rewrite = adapter(kind, seed, low_rank if at_input else through_update)
        rewrites[target.site] = [rewrite]
        updated(module, target.site, kind, rewrite)
    changed = Pipeline([InjectPass(rewrites)])(graph_module)
    expected = module(x)
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(changed(x), expected, rtol=0, atol=2e-5)
    Pipeline([EjectPass()])(changed)
    assert graph_text(changed) == text


@pytest.mark.parametrize("name", MODULES)
def test_gradients_reach_the_factors(name: str) -> None:
    graph_module, module, x = captured(name, "aten")
    (target, _) = targets(graph_module)
    rewrite = adapter(target.kind, function=through_update)
    Pipeline([InjectPass({"up": [rewrite]})])(graph_module)(x).square().sum().backward()
    a, b = rewrite.operands["mine.a"], rewrite.operands["mine.b"]
    own = {n: torch.nn.Parameter(p.detach().clone()) for n, p in (("a", a), ("b", b))}
    kind: Any = target.kind
    up = module.up.detach() + kind.delta(kind.ranks(own["a"] * 1.75), kind.rows(own["b"]))
    torch.func.functional_call(module, {"up": up}, (x,)).square().sum().backward()
    for given, expected in ((a, own["a"]), (b, own["b"])):
        assert expected.grad is not None
        torch.testing.assert_close(given.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_a_slot_holds_what_a_live_slot_holds(name: str) -> None:
    graph_module, module, x = captured(name, "aten")
    up: Any = targets(graph_module)[0].kind
    slot = Slot(up, 5, None)
    assert (slot.a.shape, slot.b.shape) == ((5, 3, up.in_features), (5, 3, up.out_features))
    changed = Pipeline([InjectPass({"up": [slot.rewrite()]})])(graph_module)
    torch.testing.assert_close(changed(x), module(x))
    rewrite = adapter(up)
    with torch.no_grad():
        slot.a[:2].copy_(up.ranks(rewrite.operands["mine.a"]))
        slot.b[:2].copy_(up.rows(rewrite.operands["mine.b"]))
        slot.a[2:] = torch.inf  # of ranks that are off
        slot.d[:2] = 1.75
    updated(module, "up", up, rewrite)
    torch.testing.assert_close(changed(x), module(x), rtol=0, atol=1e-5)


# --- not taken ---


class Odd(nn.Module):
    """Stacks that are used in ways that no rewrite knows."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.stack, self.how = nn.Parameter(torch.randn(*shape)), how

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[3, 3, 3]``."""
        return self.how(x, self.stack)


PAIRS = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x, w: torch.bmm(x, w.transpose(0, 1)), "with its dimensions in another order"),
        (lambda x, w: torch.bmm(x, w.permute(2, 0, 1)), None),
        (lambda x, w: torch.bmm(x, (w * 2)), None),
        (lambda x, w: x.unsqueeze(0) @ w, "is not known to be one batch entry for each matrix"),
        (lambda x, w: x[:1] @ w, "is not known to be one batch entry for each matrix"),
        (lambda x, w: torch.bmm(x, w[torch.tensor([True, True, True])]), "is no one list of numbers"),
        (lambda x, w: x @ w[PAIRS], "is not known to be one batch entry for each matrix|is no one list of numbers"),
        (lambda x, w: torch.einsum("eti,eio->eto", x, w), None),
    ],
    ids=["first two", "rolled", "doubled", "four dimensions", "broadcast", "mask", "pairs", "einsum"],
)
def test_other_products_are_left_with_a_reason(how: Callable[[Tensor, Tensor], Tensor], reason: str | None) -> None:
    module = Odd(how, 3, 3, 3)
    graph_module = torch.export.export(module, (torch.randn(3, 3, 3),)).module()
    report = MatchPass(lambda site: True)(graph_module).report
    assert report.matched == ()
    if reason is None:
        assert report.skipped == ()
    else:
        (skip,) = report.skipped
        assert any(part in skip.reason for part in reason.split("|"))
