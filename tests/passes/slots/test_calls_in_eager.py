"""What a call that nothing compiles costs: how many calls of torch a site's slot adds, and what of a slot is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fxpeft.passes.live import rewrite_module
from fxpeft.passes.slots.slot import ActiveRank, Slot
from fxpeft.passes.targets.operations import Linear

X = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))


class Calls(TorchFunctionMode):
    """The names of torch's functions that are called; not those that only ask something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.names.append(func.__name__.strip("_"))
        return result


def site(rank: ActiveRank | None, *, off: int = 0) -> nn.Module:
    """A linear with a slot; of the ranks in use, so many are off."""
    torch.manual_seed(0)
    module = nn.Linear(6, 10).requires_grad_(False)
    made = Slot(Linear(6, 10), 8, rank)
    randomise(made.buffers(), seed=3)
    made.d[4 - off :] = 0
    module.add_module("slot", made)
    rewrite_module(module, [made.live_rewrite()], name="site", container="slot")
    return module


def of(module: nn.Module) -> Slot:
    found = module.slot
    assert isinstance(found, Slot)
    return found


def right(module: nn.Module, ranks: int) -> Tensor:
    slot = of(module)
    base = nn.functional.linear(X, module.weight, module.bias)  # type: ignore[arg-type]
    return base + ((X @ slot.a[:ranks].T) * slot.d[:ranks]) @ slot.b[:ranks]


@pytest.mark.parametrize("dynamic", [True, False])
def test_two_products_a_scale_and_a_sum(dynamic: bool) -> None:
    """Beside the module's own product; the cast at the end is none. Ranks that are off cost two calls more."""
    rank = ActiveRank(8) if dynamic else None
    module = site(rank)
    if rank is None:
        of(module).d[4:] = 0.5
    else:
        rank.set(4)
    module(X)
    with Calls() as calls:
        found = module(X)
    assert calls.names == ["linear", "linear", "mul", "matmul", "add", "type_as"]
    assert_close(found, right(module, 8 if rank is None else 4))
    of(module).d[0] = 0
    module(X)
    with Calls() as calls:
        found = module(X)
    assert calls.names == ["linear", "linear", "mul", "eq", "where", "matmul", "add", "type_as"]
    assert_close(found, right(module, 8 if rank is None else 4))


def test_what_is_kept_is_what_the_slot_holds() -> None:
    """Another rank, other numbers, other tensors, other memory, another dtype: each is seen by the next call."""
    rank = ActiveRank(8)
    module = site(rank)
    for active in (2, 4, 3):
        rank.set(active)
        assert_close(module(X), right(module, active))
    slot = of(module)
    slot.d.mul_(3)
    slot.a.add_(1)
    assert_close(module(X), right(module, 3))
    slot.d.zero_()
    slot.a.fill_(float("inf"))
    assert torch.equal(module(X), nn.functional.linear(X, module.weight, module.bias))  # type: ignore[arg-type]
    randomise(slot.buffers(), seed=7)
    slot.b = slot.b.clone().mul_(2)
    assert_close(module(X), right(module, 3))
    slot.a.data = slot.a.clone().mul_(2)
    assert_close(module(X), right(module, 3))
    twin = copy.deepcopy(module)
    of(twin).b.mul_(2)
    assert_close(module(X), right(module, 3))
    assert_close(twin(X), right(twin, 3))
    module.double()
    assert module(X.double()).dtype is torch.float64
    with torch.inference_mode():
        assert_close(module(X.double()).float(), right(module.float(), 3))


def test_a_call_in_inference_mode_leaves_nothing_behind_that_autograd_refuses() -> None:
    module = site(ActiveRank(8))
    with torch.inference_mode():
        module(X)
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    slot = of(module)
    wanted = module.weight.sum(0) + ((slot.d[:2] * slot.b[:2].sum(1)) @ slot.a[:2])  # type: ignore[operator,union-attr]
    assert x.grad is not None
    assert_close(x.grad[0], wanted)


def test_nothing_is_kept_of_a_call_that_is_recorded() -> None:
    """Not the views of a trace, nor fakes: a graph reads the slot's own tensors, and the next call real ones."""
    module = site(ActiveRank(8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(X)
    traced = make_fx(module)(X)
    assert of(module).kept is None
    assert_close(module(X), right(module, 2))
    of(module).b.mul_(2)
    assert_close(module(X), right(module, 2))
    assert_close(traced(X), right(module, 2))
