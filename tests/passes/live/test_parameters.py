"""Read: rewritten, unchanged, numerics, one update on another, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fxpeft.passes import ParameterKind, PassError, Pipeline, ReadPass, Rewrite, graph_text
from fxpeft.passes.live import base_class, generated_source, unbind
from fxpeft.passes.live.parameters import Reading, add_product, parameter_kind, parametrized, read_graph, read_module


class Experts(nn.Module):
    """A forward that no tracer follows: it loops over what the data says, and reads one weight in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))
        self.calls = 0

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        return torch.tanh(x @ self.up[expert].t())

    def forward(self, x: Tensor, expert: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        out = torch.zeros_like(x)
        for e in expert.unique().tolist():
            out[expert == e] = scale * self.hidden(x[expert == e], e) @ self.down[e].t()
        return out


class Loud(Experts):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(self, Loud)
        return 3 * super().forward(*args, **kwargs)


def module(cls: type[Experts] = Experts) -> Experts:
    torch.manual_seed(0)
    return cls()


def run(experts: Experts) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return experts(x, torch.tensor([0, 2, 2, 0, 1, 2]), scale=0.5)


def plus(kind: ParameterKind, weight: Tensor, *, by: Tensor) -> Tensor:
    """A rewrite."""
    assert kind.leaf in ("up", "down")
    return weight + by


def times(kind: ParameterKind, weight: Tensor, *, factor: Tensor) -> Tensor:
    return weight * factor


def hold(experts: nn.Module, **operands: Tensor) -> None:
    """Make operands reachable at ``adapters.<name>``."""
    place = nn.Module()
    for name, value in operands.items():
        place.register_buffer(name, value)
    experts.add_module("adapters", place)


def updated(experts: Experts) -> dict[str, list[Rewrite]]:
    """Both weights rewritten, the first one twice."""
    by, factor = torch.full((3, 5, 4), 0.3), torch.tensor(-2.0)
    hold(experts, by=by, factor=factor, other=torch.ones(()))
    return {
        "up": [Rewrite("plus", plus, {"by": by}), Rewrite("times", times, {"factor": factor})],
        "down": [Rewrite("times", times, {"factor": factor})],
    }


@pytest.mark.parametrize("cls", [Experts, Loud])
def test_the_forward_reads_rewritten_weights(cls: type[Experts]) -> None:
    experts, wanted = module(cls), module(cls)
    with torch.no_grad():
        wanted.up.copy_((wanted.up + 0.3) * -2.0)
        wanted.down.mul_(-2.0)
    before = dict(experts.named_parameters())
    read_module(experts, updated(experts), name="experts")
    assert_close(run(experts), run(wanted), terms=1)
    assert experts.calls == 1  # what the forward writes goes to the module
    assert isinstance(experts, cls)
    assert base_class(experts) is cls
    assert all(dict(experts.named_parameters())[name] is p for name, p in before.items())
    assert torch.equal(experts.up, module(cls).up)  # from outside it is what it was
    unbind(experts)
    assert type(experts) is cls
    assert torch.equal(run(experts), run(module(cls)))


def test_text_of_the_rewritten_graph() -> None:
    experts = module()
    rewrites = updated(experts)
    pipeline = Pipeline([ReadPass({"down": (parameter_kind(experts, "down"), experts.down, rewrites["down"])})])
    graph = pipeline(read_graph())
    assert graph_text(graph) == (
        "def forward(self, *args, **kwargs):\n"
        "    _args = args\n"
        "    _kwargs = kwargs\n"
        "    base_forward = self.base_forward\n"
        "    down = self.down\n"
        "    adapters_factor = self.adapters.factor\n"
        "    mul = down * adapters_factor;  down = adapters_factor = None\n"
        "    call_reading = fxpeft_passes_live_parameters_call_reading(base_forward, {'down': mul}, _args, _kwargs);  "
        "base_forward = mul = _args = _kwargs = None\n"
        "    return call_reading\n"
    )
    assert str(pipeline.reports[0]) == "read: 1 matched, 0 skipped, 5 -> 8 nodes"
    again = pipeline(graph)
    assert again is graph
    assert not pipeline.reports[0].matched


def test_modules_of_one_kind_share_a_class() -> None:
    first, second = module(), module()
    for experts in (first, second):
        read_module(experts, updated(experts), name="experts")
    assert type(first) is type(second)


def test_copies_and_pickles_keep_the_rewrite() -> None:
    experts = module()
    read_module(experts, updated(experts), name="experts")
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert generated_source(other) == generated_source(experts)
        assert torch.equal(run(other), run(experts))
        other.get_buffer("adapters.factor").zero_()  # its own
        assert not torch.equal(run(other), run(experts))


def test_gradients_reach_the_weight_and_the_operands() -> None:
    experts = module()
    by = torch.zeros(3, 5, 4, requires_grad=True)
    hold(experts, by=by)
    read_module(experts, {"up": [Rewrite("plus", plus, {"by": by})]}, name="experts")
    run(experts).sum().backward()
    assert by.grad is not None
    assert by.grad.abs().sum() > 0
    assert torch.equal(by.grad, experts.up.grad)


@pytest.mark.parametrize("stored", [(5, 4), (1, 5, 4), (3, 5, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_kinds_and_their_algebra(stored: tuple[int, ...], transposed: bool) -> None:
    """Against sums over ranks and experts, with A expert by expert and B rank by rank."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.w = nn.Parameter(torch.randn(stored))
    holder.is_transposed = transposed
    kind, rank = parameter_kind(holder, "w"), 2
    flips = transposed and len(stored) == 3
    assert (kind.in_features, kind.out_features) == ((5, 4) if flips else (4, 5))
    assert kind.count == (stored[0] if len(stored) == 3 else 1)
    a, b = torch.randn(kind.a_shape(rank)), torch.randn(kind.b_shape(rank))
    wanted = torch.zeros(kind.count, kind.out_features, kind.in_features)
    for e in range(kind.count):
        for r in range(rank):
            wanted[e] += torch.outer(b[:, r * kind.count + e], a[e * rank + r])
    wanted = wanted.transpose(1, 2) if flips else wanted
    wanted = wanted.reshape(stored)
    ranks, rows = kind.ranks(a), kind.rows(b)
    assert (ranks.shape, rows.shape) == kind.slot_shapes(rank)
    assert_close(kind.delta(ranks, rows), wanted)
    assert_close(kind.updated(holder.w, ranks, rows), holder.w + wanted)
    assert torch.equal(kind.unranks(ranks), a)
    assert torch.equal(kind.unrows(rows, rank), b)
    assert rows.data_ptr() == b.data_ptr()
    assert ranks.data_ptr() == a.data_ptr()


def test_the_sum_keeps_the_weights_dtype_under_autocast() -> None:
    weight, left, right = torch.randn(2, 4, 3), torch.randn(2, 4, 5), torch.randn(2, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = add_product(weight, left, right)
    assert_close(found, weight + left @ right)
    half = add_product(weight.half(), left, right)
    assert half.dtype == torch.float16


def test_a_reading_is_the_module_but_for_its_values() -> None:
    experts = module()
    reading: Any = Reading(experts, {"up": torch.zeros(3, 5, 4)})
    assert isinstance(reading, Experts)
    assert not reading.up.any()
    assert reading.down is experts.down
    reading.mark = 7
    assert experts.mark == 7
    assert not reading.hidden(torch.ones(1, 4), 0).any()  # methods see the reading too
    with pytest.raises(AttributeError, match="nothing"):
        reading.nothing  # noqa: B018


def test_what_it_refuses() -> None:
    experts = module()
    rewrites = {"up": updated(experts)["up"]}
    with pytest.raises(PassError, match="expected a graph that is one call of a module"):
        Pipeline([ReadPass({})])(torch.fx.symbolic_trace(nn.Linear(2, 2)))
    with pytest.raises(PassError, match=r"^experts: Experts has no parameter 'left' of its own"):
        read_module(experts, {"left": rewrites["up"]}, name="experts")
    experts.forward = experts.forward  # type: ignore[method-assign]
    read_module(experts, rewrites, name="experts")  # its own, as accelerate leaves it
    unbind(experts)
    experts.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with pytest.raises(PassError, match=r"^experts: somebody replaced this instance's forward"):
        read_module(experts, rewrites, name="experts")
    assert type(experts) is Experts


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.LayerNorm(4), r"Parameter of float32 \[4\]"),
        (lambda: nn.Conv2d(2, 3, 1), r"Parameter of float32 \[3, 2, 1, 1\]"),
        (lambda: nn.Linear(2, 3).to(torch.float8_e4m3fn), r"Parameter of float8_e4m3fn \[3, 2\]"),
    ],
)
def test_kinds_that_take_no_update(make: Any, found: str) -> None:
    with pytest.raises(PassError, match=rf"expected a floating-point parameter .* found a {found}"):
        parameter_kind(make(), "weight")
    with pytest.raises(PassError, match="no parameter 'scale' of its own"):
        parameter_kind(make(), "scale")


def test_what_a_parametrization_computes_is_updated() -> None:
    """PEFT takes it too: before, it was refused as no parameter."""
    torch.manual_seed(0)
    linear = weight_norm(nn.Linear(2, 3))
    assert parametrized(linear) == ["weight"]
    assert parameter_kind(linear, "weight") == ParameterKind(2, 3, "weight")
    x, by = torch.randn(4, 2), torch.randn(3, 2)
    wanted = x @ (linear.weight + by).t() + linear.bias
    hold(linear, by=by)
    own = type(linear)
    read_module(linear, {"weight": [Rewrite("plus", lambda kind, weight, *, by: weight + by, {"by": by})]}, name="l")
    torch.testing.assert_close(linear(x), wanted)
    unbind(linear)
    assert type(linear) is own
    assert parametrized(nn.Linear(2, 3)) == []
