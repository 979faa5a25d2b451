"""The pass interface: a graph module in, a graph module and a report out.

Built on ``torch.fx.passes.infra.pass_base``. A fxpeft pass differs in one point: its result also
says what it matched and what it left alone, with the reason.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxpeft.errors import PassError as PassError


@dataclass(frozen=True)
class Skip:
    """A site that a pass left as it was, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What one pass did to one graph."""

    name: str
    matched: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0

    def __str__(self) -> str:
        line = (
            f"{self.name}: {len(self.matched)} matched, {len(self.skipped)} skipped, "
            f"{self.nodes_before} -> {self.nodes_after} nodes"
        )
        return "\n".join([line, *(f"  skipped {s.site or '(root)'}: {s.reason}" for s in self.skipped)])


class RewriteResult(PassResult):
    """``PassResult`` (``graph_module``, ``modified``) with the pass's :class:`Report`."""

    report: Report

    def __new__(cls, graph_module: GraphModule, modified: bool, report: Report) -> RewriteResult:
        self = cast(RewriteResult, super().__new__(cls, graph_module, modified))
        self.report = report
        return self


class GraphPass(PassBase):
    """One rewrite of one graph.

    A subclass sets ``name`` and implements :meth:`call`. A pass is idempotent: on a graph it has
    already rewritten it reports ``modified=False``. It edits the graph only; linting and
    recompiling are the :class:`~fxpeft.passes.Pipeline`'s, once per pass that changed something.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> RewriteResult:
        """Rewrite ``graph_module.graph`` in place and say what was done."""

    def __call__(self, graph_module: GraphModule) -> RewriteResult:
        return cast(RewriteResult, super().__call__(graph_module))


class TracedModule(GraphModule):
    """A graph to be rewritten and read, never run: its code is not compiled."""

    def recompile(self) -> Any:
        """Nothing: torch.fx keeps the source of all that it compiles for ever."""


def attribute(root: torch.nn.Module, path: str) -> Any:
    """The object at a dotted path below ``root``; ``AttributeError`` names the missing part.

    A module's own parameters, buffers and children come first: those of a module that another one answers for
    are hidden behind attributes that give the other's (see ``replace_module``).
    """
    found: Any = root
    for atom in path.split(".") if path else ():
        value = None
        if isinstance(found, torch.nn.Module):
            own = vars(found)
            for registry in ("_modules", "_parameters", "_buffers"):
                if (value := own.get(registry, {}).get(atom)) is not None:
                    break
        found = getattr(found, atom) if value is None else value
    return found


def submodule(root: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a dotted path below ``root``, its own and not one that answers for it.

    Raises:
        AttributeError: there is none.
    """
    found = attribute(root, path)
    if not isinstance(found, torch.nn.Module):
        raise AttributeError(f"{path} is a {type(found).__name__}, no module")
    return found


def join(*parts: str) -> str:
    """A dotted path of the parts; the root's name, ``""``, adds none."""
    return ".".join(part for part in parts if part)


def node_of(value: object) -> Node | None:
    """``value`` where it is a graph node."""
    return value if isinstance(value, Node) else None


def tensor_of(node: Node) -> torch.Tensor | None:
    """The tensor without data that stands for a node's result while compiling; ``None`` where there is none."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None
