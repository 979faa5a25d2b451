"""Gradients that are written out, against autograd's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor, nn

from fxpeft.passes import Rewrite
from fxpeft.passes.container import Container
from fxpeft.passes.live import derived, forward_text, rewrite_module
from fxpeft.passes.targets.kinds import Kind

Base = Callable[[Tensor], Tensor]


def twice(kind: Kind, base: Base, x: Tensor, *, a: Tensor, b: Tensor) -> Tensor:
    update = F.linear(F.linear(x.type_as(a), a), b)
    return base(x) + (update + update)


def taken_off(kind: Kind, base: Base, x: Tensor, *, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    y = base(x)
    return (0.5 * y + c - F.linear(F.linear(x.type_as(a), a) * 1.5, b)).type_as(y)


def gained(kind: Kind, base: Base, x: Tensor, *, a: Tensor, b: Tensor, c: Tensor, drop: Any) -> Tensor:
    y = base(x)
    return (F.linear(F.linear(drop(x.type_as(a)), a), b) * c + y).type_as(y)


def of_rows(kind: Kind, base: Base, x: Tensor, *, a: Tensor, b: Tensor, g: Tensor, drop: Any) -> Tensor:
    y = base(x)
    h = torch.matmul(drop((x * g).type_as(a)), a.t())
    return (y + torch.add(torch.matmul(h * h, b.t()), torch.matmul(h.type_as(y), b.t().type_as(y)))).type_as(y)


FUNCTIONS = (twice, taken_off, gained, of_rows)
SIZES = {"a": (2, 6), "b": (5, 2), "c": (5,), "g": (6,)}


def adapted(function: Any) -> Any:
    """A bfloat16 linear with a method of float32 values."""
    torch.manual_seed(0)
    module: Any = nn.Linear(6, 5).bfloat16().requires_grad_(False)
    values: dict[str, Any] = {name: nn.Parameter(torch.randn(size)) for name, size in SIZES.items()}
    values["drop"] = nn.Dropout(0.4)
    own = {n: v for n, v in values.items() if n in function.__annotations__}
    module.adapters = Container()
    module.adapters.it = nn.Module()
    for name, value in own.items():
        setattr(module.adapters.it, name, value)
    rewrite_module(module, [Rewrite("mine", function, {f"it.{n}": v for n, v in own.items()})], name="it")
    return module


@contextmanager
def by_autograd() -> Iterator[None]:
    with patch.object(derived, "is_recorded", lambda: True):
        yield


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,), (0, 6)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_autograd(function: Any, shape: tuple[int, ...]) -> None:
    module = adapted(function)
    assert "def _backward0" in forward_text(module)
    x = torch.randn(shape).bfloat16().requires_grad_()
    up = torch.randn(*shape[:-1], 5)

    def found(*, needed: bool = True) -> list[Tensor]:
        torch.manual_seed(1)
        given = [*module.adapters.parameters(), *([x] if needed else [])]
        y = module(x if needed else x.detach())
        return [y.detach(), *torch.autograd.grad(y, given, up.to(y.dtype))]

    ours, without = found(), found(needed=False)
    with by_autograd():
        wanted = found()
    for one, other in zip(ours, wanted, strict=True):
        assert_close(one, other)
    for one, other in zip(without, ours, strict=False):
        assert torch.equal(one, other)
    torch.manual_seed(1)
    assert type(module(x).grad_fn).__name__ == "_DerivedBackward"


def test_a_module_that_is_set_to_evaluation_between_forward_and_backward_has_the_mask_of_its_forward() -> None:
    module, x = adapted(gained), torch.randn(7, 6).bfloat16().requires_grad_()
    wanted = None
    for late in (False, True):
        torch.manual_seed(1)
        y = module.train()(x)
        module.train(not late)
        (found,) = torch.autograd.grad(y.sum(), x)
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted)


def test_a_mask_is_that_of_functional_dropout() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(33, 7, dtype=dtype).t()  # drawn in the order of its memory
        torch.manual_seed(4)
        wanted = F.dropout(x, 0.3)
        torch.manual_seed(4)
        mask, how = derived.drawn(x, nn.Dropout(0.3))
        assert torch.equal(x * mask, wanted)
        torch.manual_seed(4)
        assert torch.equal(derived.noise(*how), mask)
    assert derived.drawn(x, nn.Dropout(0.3).eval())[0] is None
    assert not derived.drawn(x, nn.Dropout(1.0))[0].any()
