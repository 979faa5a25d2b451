"""One small program in every form a graph can have, and a rewrite with operands of every sort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.passes import Kind, MatchPass, Pipeline, Rewrite
from fxpeft.passes.meta import TARGET


class Program(nn.Module):
    """A look-up, two linears in a chain (the first with a second user), a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[batch, length]`` to ``[batch, 6, length]``."""
        h = self.up(self.words(ids))
        return self.conv(self.down(h).transpose(1, 2)) + h.mean()


class Functional(Program):
    """The same mathematics in functions that read the weights."""

    def forward(self, ids: Tensor) -> Tensor:
        """As above."""
        h = F.linear(F.embedding(ids, self.words.weight), self.up.weight, self.up.bias)
        y = F.linear(h, self.down.weight, bias=self.down.bias)
        return F.conv1d(y.transpose(1, 2), self.conv.weight, self.conv.bias, padding=1, groups=2) + h.mean()


SITES = ("words", "up", "down", "conv")
IDS = torch.tensor([[1, 5, 2, 0, 6], [3, 3, 4, 1, 2]])


def program(cls: type[Program] = Program) -> Program:
    """The program with fixed weights."""
    torch.manual_seed(0)
    return cls().eval()


def modules() -> GraphModule:
    """``call_module`` nodes."""
    return torch.fx.symbolic_trace(program())


def functions() -> GraphModule:
    """``F.linear`` and its kin on ``get_attr`` weights."""
    return torch.fx.symbolic_trace(program(Functional))


def exported() -> GraphModule:
    """``aten.linear`` and its kin."""
    return torch.export.export(program(), (IDS,)).module()


def decomposed() -> GraphModule:
    """``aten.addmm`` on permuted weights, ``aten.convolution``."""
    return torch.export.export(program(), (IDS,)).run_decompositions().module()


FORMS: dict[str, Callable[[], GraphModule]] = {
    "call_module": modules, "functional": functions, "aten": exported, "core aten": decomposed,
}  # fmt: skip


def matched(graph_module: GraphModule, *sites: str) -> GraphModule:
    """The graph with these sites annotated; all by default."""
    wanted = sites or SITES
    return Pipeline([MatchPass(lambda site: site in wanted)])(graph_module)


def low_rank(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``base(x) + B (scale A x)``."""
    h = kind.scale(kind.reduce(x, a), scale)
    return base(x) + kind.expand(h if drop is None else drop(h), b)


def doubled(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``2 base(x)``."""
    return base(x) * 2


def halved_input(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``base(x / 2)``."""
    return base(x / 2)


def lora(kind: Kind, name: str = "mine", *, rank: int = 4, seed: int = 0, **more: Any) -> Rewrite:
    """A low-rank rewrite of a kind with random factors, B not zero, and a scale other than one."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=generator) * 0.3 for s in (kind.a_shape(rank), kind.b_shape(rank)))
    operands = {"a": nn.Parameter(a), "b": nn.Parameter(b), "scale": torch.tensor(1.75), **more}
    return Rewrite(f"lora:{name}", low_rank, {f"{name}.{k}": v for k, v in operands.items()})


def snapshot(graph_module: GraphModule) -> tuple[object, ...]:
    """Everything that must come back: code, node names, attributes, modules, state_dict keys."""
    modules = [name for name, _ in graph_module.named_modules()]
    held = {**graph_module._parameters, **graph_module._buffers}
    return str(graph_module.graph), graph_module.code, modules, list(graph_module.state_dict()), list(held)


def chains(graph_module: GraphModule, *sites: str) -> dict[str, list[Rewrite]]:
    """Rewrites of every sort for the sites."""
    found = {TARGET.of(n).site: TARGET.of(n).kind for n in graph_module.graph.nodes if TARGET.has(n)}
    made = {}
    for i, site in enumerate(sites):
        made[site] = [lora(found[site], seed=i), Rewrite("double", doubled), lora(found[site], "more", rank=2)]
        if site != "words":  # ids can't be halved
            made[site].insert(1, Rewrite("half", halved_input))
    return made
