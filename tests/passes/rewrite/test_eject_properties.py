"""Inject and eject on programs that nobody wrote: any sites, any rewrites, in any order; the graph comes back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from graphs import chains, matched, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import EjectPass, InjectPass, Pipeline

STEADY = settings(deadline=None, derandomize=True, max_examples=40)
WIDTHS = (3, 5, 6)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Drawn(nn.Module):
    """A program of steps: linears as modules or functions, some called twice, and what lies between them.

    Each step is a sort, an earlier value's number and another's; the values are reused wherever their widths fit.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps: list[tuple[str, int, int, str]] = []
        widths = [6]
        for number, (sort, first, second) in enumerate(steps):
            first, second, name = first % len(widths), second % len(widths), f"lin{number}"
            if sort in ("module", "function"):
                setattr(self, name, nn.Linear(widths[first], WIDTHS[second % 3], bias=bool(second % 2)))
                widths.append(WIDTHS[second % 3])
            elif sort == "again":
                fitting = [n for n, m in self.named_children() if m.in_features == widths[first]]
                sort, name = ("module", fitting[second % len(fitting)]) if fitting else ("tanh", "")
                widths.append(getattr(self, name).out_features if fitting else widths[first])
            else:
                widths.append(widths[first])
                sort = sort if sort == "tanh" or widths[first] == widths[second] else "tanh"
            self.steps.append((sort, first, second, name))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 6]`` to a sum of all values, so that each has a user."""
        values = [x]
        for sort, first, second, name in self.steps:
            if sort == "module":
                values.append(getattr(self, name)(values[first]))
            elif sort == "function":
                own = getattr(self, name)
                values.append(F.linear(values[first], own.weight, own.bias))
            elif sort == "add":
                values.append(values[first] + values[second])
            else:
                values.append(values[first].tanh())
        return torch.stack([v.sum(-1) for v in values]).sum(0)


STEPS = st.lists(
    st.tuples(st.sampled_from(["module", "function", "again", "add", "tanh"]), st.integers(0, 6), st.integers(0, 6)),
    min_size=1, max_size=7,
).filter(lambda steps: any(sort in ("module", "function") for sort, *_ in steps))  # fmt: skip
FORMS = {
    "fx": torch.fx.symbolic_trace,
    "aten": lambda program: torch.export.export(program, (X,)).module(),
}


def drawn(steps: list[tuple[str, int, int]], form: str) -> tuple[GraphModule, list[str]]:
    program = Drawn(steps).eval()
    sites = [name for name, _ in program.named_children()]
    return matched(FORMS[form](program), *sites), sites


def check(steps: list[tuple[str, int, int]], form: str, data: Any) -> None:
    graph_module, sites = drawn(steps, form)
    before, output = snapshot(graph_module), graph_module(X)
    wanted = data.draw(st.lists(st.sampled_from(sites), min_size=1, unique=True))
    rewrites = chains(graph_module, *wanted)
    for site, chain in rewrites.items():
        rewrites[site] = chain[: data.draw(st.integers(1, len(chain)))]
    together = data.draw(st.booleans())
    for part in [rewrites] if together else [{site: chain} for site, chain in rewrites.items()]:
        Pipeline([InjectPass(part)])(graph_module)
    graph_module.graph.lint()
    assert not torch.equal(graph_module(X), output)
    for site in data.draw(st.permutations(wanted)):
        Pipeline([EjectPass(lambda name, wanted=site: name == wanted)])(graph_module)
    assert snapshot(graph_module) == before
    assert torch.equal(graph_module(X), output)
    # and again, all at once
    Pipeline([InjectPass(rewrites), EjectPass()])(graph_module)
    assert snapshot(graph_module) == before


@STEADY
@given(STEPS, st.data())
def test_a_traced_program_comes_back_node_for_node(steps: list[tuple[str, int, int]], data: Any) -> None:
    check(steps, "fx", data)


@settings(STEADY, max_examples=12)
@given(STEPS, st.data())
def test_an_exported_program_comes_back_node_for_node(steps: list[tuple[str, int, int]], data: Any) -> None:
    check(steps, "aten", data)
