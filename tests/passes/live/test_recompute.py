"""The pass that lets a site's wide values be made again in the backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.passes import InjectPass, Pipeline, Rewrite
from fxpeft.passes.live import trace_module
from fxpeft.passes.live.recompute import RecomputePass
from fxpeft.passes.source import graph_source
from fxpeft.passes.targets.kinds import Kind


def low_rank(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, b: Tensor) -> Tensor:
    return base(x) + F.linear(F.linear(x.type_as(a), a), b)


def clamped(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, b: Tensor) -> Tensor:
    return base(x) + F.linear(F.linear(torch.clamp(x, 0, 1), a), b)


def gained(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return base(x) + g * F.linear(F.linear(x, a), b)


def cast_and_gained(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, b: Tensor, g: Tensor
) -> Tensor:
    return base(x) + F.linear(F.linear(x.type_as(a), a), b) * g


def rewritten(function: Any, *, trained: bool = True, **more: Tensor) -> tuple[Pipeline, str]:
    values = {"a": torch.randn(2, 6), "b": torch.randn(5, 2), **more}
    operands = {f"it.{n}": nn.Parameter(v) if trained else v for n, v in values.items()}
    pipeline = Pipeline([InjectPass({"": [Rewrite("mine", function, operands)]}), RecomputePass()])
    return pipeline, graph_source(pipeline(trace_module(nn.Linear(6, 5))).graph)


def called(source: str) -> tuple[str, str]:
    """The functions that are called again, and the site that calls them."""
    inner, _, site = source.partition("def _site0")
    return inner, site.partition("def ")[0]


def test_a_cast_moves_and_the_second_product_stays() -> None:
    pipeline, source = rewritten(low_rank)
    report = pipeline.reports[-1]
    assert report.matched == ("",)
    inner, outer = called(source)
    assert "type_as" in inner
    assert "type_as" not in outer
    assert inner.count("linear(") == 1
    assert outer.count("linear(") == 1


def test_a_gain_of_an_update_is_made_with_it() -> None:
    _, source = rewritten(gained, g=torch.randn(5))
    inner, outer = called(source)
    assert inner.count("linear(") == 1  # nothing is cast, so the first product stays
    assert " * " in inner
    assert outer.count("linear(") == 1


def test_one_function_takes_what_another_gives() -> None:
    _, source = rewritten(cast_and_gained, g=torch.randn(5))
    assert "recompute(_recomputed0, (input_1,), (a,), True, ((0, 0),))" in re.sub(
        r"fxpeft_\w+_|it_|adapters_", "", source
    )
    assert "recompute(_recomputed1, (recompute,), (b, g))" in re.sub(r"fxpeft_\w+_|it_|adapters_", "", source)


@pytest.mark.parametrize(("function", "trained"), [(clamped, True), (low_rank, False)])
def test_what_is_left_alone(function: Any, trained: bool) -> None:
    pipeline, source = rewritten(function, trained=trained)
    report = pipeline.reports[-1]
    assert not report.matched
    assert "_recomputed" not in source
    if trained:
        assert "clamp" in report.skipped[0].reason
        assert "may give something else when it is called again" in report.skipped[0].reason


def test_a_second_run_changes_nothing() -> None:
    values = {"it.a": nn.Parameter(torch.randn(2, 6)), "it.b": nn.Parameter(torch.randn(5, 2))}
    passes = [InjectPass({"": [Rewrite("mine", low_rank, values)]}), RecomputePass()]
    graph_module = Pipeline(passes)(trace_module(nn.Linear(6, 5)))
    result = RecomputePass()(graph_module)
    assert not result.modified
    assert result.graph_module is graph_module
