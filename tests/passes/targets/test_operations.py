"""Operations: one record each, the registry, and one that is registered from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import IDS, program
from tiny import randomise
from torch import Tensor, nn
from torch.fx import Node

import fxpeft
from fxpeft.model.skeleton import Outline, kind_from_json, kind_to_json, skeleton
from fxpeft.passes import (
    OPERATIONS,
    Conv,
    Embedding,
    Kind,
    Linear,
    MatchPass,
    OpSpec,
    Places,
    Weight,
    pattern,
    register_operation,
)
from fxpeft.passes.live import kind_of
from fxpeft.passes.meta import TARGET
from fxpeft.passes.targets.operations.registry import kind_names, module_operation, operation_named, operation_of_kind

KINDS = [
    Linear(5, 7),
    Embedding(5, 7),
    Conv(4, 6, (3,), (2,), (1,), (1,), 2),
    Conv(3, 5, (3, 2), (1, 1), "same", (2, 1), 1),
    Conv(2, 4, (1, 2, 3), (1, 1, 1), (0, 1, 0), (1, 1, 1), 2),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_stub_is_of_the_kind_that_it_stands_for(kind: Kind) -> None:
    operation = operation_of_kind(kind)
    for biased in (False, True):
        stub = operation.stub(kind, biased)
        found = module_operation(stub)
        assert found is not None
        assert found[0] is operation
        assert kind_to_json(kind_of(stub)) == kind_to_json(kind)
        assert (getattr(stub, "bias", None) is not None) == (biased and kind.takes_bias)
        weight = stub.get_parameter("weight")
        plain = (kind.out_features, kind.in_features // kind.groups, *kind.kernel)
        assert tuple(weight.t().shape if operation.flip else weight.shape) == plain
        assert type(stub) in operation.modules


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_is_written_down_and_read(kind: Kind) -> None:
    assert kind_from_json(kind_to_json(kind), "here") == kind
    assert operation_named(kind.name) is operation_of_kind(kind)
    assert kind.name in kind_names()


def test_parameters_are_in_no_manifest() -> None:
    assert operation_named("parameter") is None
    with pytest.raises(fxpeft.AdapterError, match="expected a known kind of target, found 'parameter'"):
        kind_from_json({"kind": "parameter", "in": 3, "out": 4}, "here")


# --- an operation from outside ---


@torch.library.custom_op("fxpeft_tests::halved", mutates_args=())
def halved(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.t() / 2``."""
    return x @ weight.t() / 2


@halved.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


CALL = torch.ops.fxpeft_tests.halved.default


class Halved(nn.Module):
    """A layer of that operation."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, size))

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., in]``."""
        return CALL(x, self.weight)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class HalvedKind(Kind):
    """Half of a linear."""

    name = family = "halved"

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().apply(x, weight) / 2

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return super().reduce(x, a) / 2


def _read(node: Node, weight: Weight) -> HalvedKind:
    return HalvedKind(weight.shape[1], weight.shape[0])


HALVED = OpSpec(
    kind=HalvedKind,
    calls={CALL: Places(bias=None)},
    read=_read,
    modules=(Halved,),
    stub=lambda kind, biased: Halved(kind.in_features, kind.out_features),
)


@pytest.fixture
def registered() -> Iterator[None]:
    register_operation(HALVED)
    yield
    OPERATIONS.remove(HALVED)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Halved(5, 7), nn.Tanh(), nn.Linear(7, 3))


def test_it_is_no_target_before() -> None:
    with pytest.raises(fxpeft.AdapterError, match="0: Halved is no kind of target: expected linear, embedding"):
        fxpeft.add_adapter(net(), fxpeft.LoraConfig(target_modules=["0"]))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("captured", [False, True])
def test_an_operation_from_outside_has_sites(captured: bool) -> None:
    model, x = net(), torch.randn(2, 4, 5)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, lora_alpha=7, target_modules="kind:halved"))
    randomise(p for name, p in model.named_parameters() if "lora_" in name)
    own = fxpeft.adapter_state_dict(model)
    a, b = (next(v for k, v in own.items() if f"lora_{name}" in k) for name in "AB")
    expected = net()
    expected[0].weight = nn.Parameter(expected[0].weight + 7 / 3 * b.detach() @ a.detach())  # type: ignore[index]
    run: Any = model
    if captured:
        program = torch.export.export(net(), (x,))
        config = fxpeft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"])
        rewritten = fxpeft.rewrite(program, config, state_dict=own)
        run = rewritten.module()
        assert str(fxpeft.eject(rewritten).graph) == str(program.graph)
    torch.testing.assert_close(run(x), expected(x), rtol=0, atol=1e-5)
    assert (run(x) - net()(x)).abs().max() > 0.05


@pytest.mark.usefixtures("registered")
def test_it_has_a_name_and_a_form_on_paper() -> None:
    graph_module = torch.export.export(net(), (torch.randn(2, 5),)).module()
    report = MatchPass(pattern("kind:halved & in=5"))(graph_module).report
    assert report.matched == ("0",)
    (target,) = (TARGET.of(n) for n in graph_module.graph.nodes if TARGET.has(n))
    assert target.kind == HalvedKind(5, 7)
    assert kind_from_json(kind_to_json(target.kind), "here") == HalvedKind(5, 7)
    module = skeleton({"0": Outline(target.kind)}).get_submodule("0")
    assert isinstance(module, Halved)
    assert kind_of(module) == HalvedKind(5, 7)


def test_what_was_read_before_is_read_anew() -> None:
    module = Halved(5, 7)
    module.in_features, module.out_features = 5, 7  # as a quantised linear has them
    assert kind_of(module) == Linear(5, 7)
    register_operation(HALVED)
    try:
        assert kind_of(module) == HalvedKind(5, 7)
    finally:
        OPERATIONS.remove(HALVED)
    assert kind_of(module) == Linear(5, 7)


@pytest.mark.usefixtures("registered")
def test_what_is_taken_is_refused() -> None:
    register_operation(HALVED)  # twice is once
    assert OPERATIONS.count(HALVED) == 1
    for wrong in (
        OpSpec(HalvedKind, {torch.ops.aten.linear.default: Places()}, _read, HALVED.stub, names=("other",)),
        OpSpec(HalvedKind, {}, _read, HALVED.stub),
        OpSpec(HalvedKind, {}, _read, HALVED.stub, names=("conv",)),
    ):
        with pytest.raises(ValueError, match=r"there is an operation with (aten\.linear\.default|halved|conv) already"):
            register_operation(wrong)
    assert OPERATIONS[-1] is HALVED


def test_others_find_what_they_found() -> None:
    graph_module = torch.export.export(program(), (IDS,)).module()
    assert MatchPass(lambda site: True)(graph_module).report.skipped == ()
    assert [type(TARGET.of(n).kind) for n in graph_module.graph.nodes if TARGET.has(n)] == [
        Embedding, Linear, Linear, Conv,
    ]  # fmt: skip
