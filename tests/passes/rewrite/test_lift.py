"""Lift: operands become placeholders, once for each tensor; bodies get theirs handed in; and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from graphs import FORMS, IDS, lora, matched
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import EjectPass, InjectPass, LiftPass, PassError, Pipeline, RedirectPass
from fxpeft.passes.meta import INPUTS, LIFTED, OPERAND, TARGET
from fxpeft.passes.rewrite.inject import get_attr, install
from fxpeft.passes.rewrite.lift import drop_unused, hand_in, last_placeholder, lift_bodies, remove

SITES = ("up", "down")


def adapted(form: str, *, bias: bool = False) -> GraphModule:
    graph_module = matched(FORMS[form]())
    kinds = {TARGET.of(n).site: TARGET.of(n).kind for n in graph_module.graph.nodes if TARGET.has(n)}
    passes: list[Any] = [InjectPass({site: [lora(kinds[site], seed=i)] for i, site in enumerate(SITES)})]
    if bias:
        passes.append(RedirectPass({"up": {"bias": ("own.bias", torch.linspace(-1, 2, 10))}}))
    return Pipeline(passes)(graph_module)


def placeholders(graph_module: GraphModule) -> list[str]:
    return [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]


@pytest.mark.parametrize("form", FORMS)
def test_rewritten(form: str) -> None:
    graph_module = adapted(form)
    before = placeholders(graph_module)
    lift = LiftPass()
    result = lift(graph_module)
    graph_module.recompile()
    graph_module.graph.lint()
    assert result.modified
    assert placeholders(graph_module) == before + list(lift.lifted)
    assert sorted(path for path, _ in lift.lifted.values()) == sorted(
        f"adapters.{site}.mine.{part}" for site in SITES for part in ("a", "b", "scale")
    )
    assert result.report.matched == tuple(lift.lifted)
    assert not any(OPERAND.has(n) for n in graph_module.graph.nodes)
    assert not hasattr(graph_module, "adapters")  # it holds none of them any more
    prefixes = {name: "p_" if isinstance(t, nn.Parameter) else "b_" for name, (_, t) in lift.lifted.items()}
    assert all(name.startswith(prefix) for name, prefix in prefixes.items())


@pytest.mark.parametrize("form", FORMS)
def test_numerics(form: str) -> None:
    """Whoever calls it decides about the values."""
    graph_module = adapted(form, bias=form != "call_module")
    wanted, lift = graph_module(IDS), LiftPass()
    Pipeline([lift])(graph_module)
    tensors = [tensor for _, tensor in lift.lifted.values()]
    assert_close(run(graph_module, tensors), wanted, terms=1)
    assert not torch.allclose(run(graph_module, [t * 2 for t in tensors]), wanted, atol=0.01)


def run(graph_module: GraphModule, tensors: list[Tensor]) -> Tensor:
    """Its graph on ids and operands, past the argument check that exported modules have."""
    found: Any = torch.fx.Interpreter(graph_module).run(IDS, *tensors, enable_io_processing=False)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def test_unchanged() -> None:
    graph_module = matched(FORMS["functional"]())
    before = str(graph_module.graph)
    result = LiftPass()(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
    lifted = adapted("functional")
    Pipeline([LiftPass()])(lifted)
    again = LiftPass()
    assert not again(lifted).modified
    assert again.lifted == {}
    assert str(graph_module.graph) == before


def test_a_tensor_with_several_reads_has_one_placeholder() -> None:
    graph_module = torch.fx.symbolic_trace(nn.Tanh())
    shared, output = torch.randn(3), next(n for n in graph_module.graph.nodes if n.op == "output")
    install(graph_module, "adapters.one", shared)
    install(graph_module, "adapters.two", shared)
    value = output.args[0]
    for path in ("adapters.one", "adapters.two", "adapters.one"):
        with graph_module.graph.inserting_before(output):
            read = get_attr(graph_module.graph, path)
            OPERAND.set(read, True)
            value = graph_module.graph.call_function(torch.add, (value, read))
    output.args = (value,)
    lift = LiftPass()
    Pipeline([lift])(graph_module)
    assert len(lift.lifted) == 1
    x = torch.randn(3)
    torch.testing.assert_close(graph_module(x, shared), x.tanh() + 3 * shared)
    assert not hasattr(graph_module, "adapters")


def test_a_chosen_place() -> None:
    graph_module = adapted("functional")
    first = next(iter(graph_module.graph.nodes))
    lift = LiftPass(lambda gm, tensor: first if isinstance(tensor, nn.Parameter) else None)
    Pipeline([lift])(graph_module)
    names = placeholders(graph_module)
    assert names[0] == first.name
    parameters = [name for name, (_, tensor) in lift.lifted.items() if isinstance(tensor, nn.Parameter)]
    assert set(names[1 : 1 + len(parameters)]) == set(parameters)


# --- one argument for all ---


@pytest.mark.parametrize("form", ["call_module", "functional"])
def test_handed_in_as_one_argument(form: str) -> None:
    graph_module = adapted(form)
    wanted = graph_module(IDS)
    hand_in(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    operands = INPUTS.of(graph_module)
    assert set(operands) == {f"{site}.mine.{part}" for site in SITES for part in ("a", "b", "scale")}
    torch.testing.assert_close(graph_module(IDS, operands), wanted)
    zero = {key: torch.zeros_like(tensor) for key, tensor in operands.items()}
    torch.testing.assert_close(graph_module(IDS, zero), FORMS[form]()(IDS))
    with pytest.raises(PassError, match="an argument named 'adapters' already; eject that adapter first"):
        hand_in(graph_module)
    Pipeline([EjectPass()])(graph_module)
    assert [n.name for n in drop_unused(graph_module)] == ["adapters"]


def test_nested_arguments_have_no_room() -> None:
    class Nested(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return x["a"] + 1

    graph_module = torch.export.export(Nested(), ({"a": torch.ones(2)},)).module()
    with pytest.raises(PassError, match="arguments are nested"):
        hand_in(graph_module)


# --- bodies ---


class Branches(nn.Module):
    """A branch in a branch: what the inner one reads goes through both."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.cond(y.sum() > 1, lambda z: z.tanh(), lambda z: z * 2, (y,))

        return torch.cond(x.sum() > 0, inner, lambda y: y - 1, (x,))


def bodies(graph_module: GraphModule) -> list[GraphModule]:
    return [m for m in graph_module.modules() if isinstance(m, GraphModule) and m is not graph_module]


def with_operand(graph_module: GraphModule, wanted: Callable[[GraphModule], bool], tensor: Tensor) -> GraphModule:
    """Let one body add an operand to its result."""
    body = next(b for b in bodies(graph_module) if wanted(b))
    install(body, "adapters.x", tensor)
    output = next(n for n in body.graph.nodes if n.op == "output")
    with body.graph.inserting_before(output):
        read = get_attr(body.graph, "adapters.x")
        OPERAND.set(read, True)
        result = body.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], read))
    output.args = ((result,),)
    body.recompile()
    return body


def test_through_every_level_of_bodies_and_back() -> None:
    x = torch.tensor([0.7, 0.9])  # into both first branches
    graph_module = torch.export.export(Branches(), (x,)).module()
    before = [str(b.graph) for b in bodies(graph_module)]
    operand = torch.tensor([3.0, -5.0])
    tanh = torch.ops.aten.tanh.default
    body = with_operand(graph_module, lambda b: any(n.target is tanh for n in b.graph.nodes), operand)
    lift_bodies(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    assert graph_module.get_buffer("adapters.x") is operand  # only the root holds it
    assert not any(hasattr(b, "adapters") for b in bodies(graph_module))
    for b in bodies(graph_module):  # all branches of a call take the same operands
        last = last_placeholder(b)
        assert last is not None
        assert LIFTED.of(last) == "adapters.x"
    torch.testing.assert_close(graph_module(x), x.tanh() + operand)
    torch.testing.assert_close(graph_module(-x), -x - 1)
    added = next(n for n in body.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    added.replace_all_uses_with(added.args[0])
    body.graph.erase_node(added)
    assert drop_unused(graph_module) == []
    graph_module.recompile()
    assert [str(b.graph) for b in bodies(graph_module)] == before
    assert not hasattr(graph_module, "adapters")
    torch.testing.assert_close(graph_module(x), x.tanh())


def test_removing_an_attribute_removes_what_is_empty_then() -> None:
    root = nn.Module()
    install(root, "a.b.c", torch.ones(1))
    install(root, "a.d", torch.ones(1))
    remove(root, "a.b.c")
    assert not hasattr(root.a, "b")
    remove(root, "a.b.c")  # gone already
    remove(root, "a.d")
    assert not hasattr(root, "a")
