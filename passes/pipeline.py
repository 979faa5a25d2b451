"""Run passes over a graph: any graph module in, the rewritten one and a report per pass out."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch.fx import GraphModule

from fxpeft.passes.base import PassError, Report, RewriteResult
from fxpeft.passes.draw import Picture, Sketch, drawing_of, sketch
from fxpeft.passes.source import check_names

log = logging.getLogger(__name__)


def graph_text(graph_module: GraphModule) -> str:
    """The graph as Python source, the form in which a person reads it."""
    return graph_module.graph.python_code("self").src.strip() + "\n"


class Runs(Protocol):
    """What a pipeline runs: a pass, or one that is bound to what it is told of the graph."""

    @property
    def name(self) -> str:
        """Its name, in reports and files."""

    def __call__(self, graph_module: GraphModule) -> RewriteResult:
        """Rewrite the graph and say what was done."""


class Pipeline:
    """Passes in order, each linted and recompiled if it changed the graph.

    Args:
        passes: the passes; each has a ``name``.
        dump: a folder that receives ``01-match-before.py``, ``01-match-after.py``, ... (the
            graph as source) for every run; made where missing.

    A graph with a name that would become code is refused (:func:`fxpeft.passes.source.check_names`).

    After a call, :attr:`reports` holds one :class:`Report` per pass of that call, and :meth:`draw`
    shows what it did.
    """

    def __init__(self, passes: Sequence[Runs], *, dump: Path | str | None = None) -> None:
        self.passes = tuple(passes)
        self.dump = None if dump is None else Path(dump)
        self.reports: tuple[Report, ...] = ()
        self._sketches: tuple[Sketch, Sketch] | None = None

    def __call__(self, graph_module: GraphModule) -> GraphModule:
        reports = []
        check_names(graph_module.graph)
        before = sketch(graph_module)
        for number, graph_pass in enumerate(self.passes, start=1):
            stem = f"{number:02d}-{graph_pass.name}"
            self._write(f"{stem}-before.py", graph_module)
            ops = _ops(graph_module) if log.isEnabledFor(logging.DEBUG) else None
            result = graph_pass(graph_module)
            graph_module = result.graph_module
            if result.modified:
                with warnings.catch_warnings():
                    # lint knows parameters, buffers and modules; a slot's active rank is a plain object
                    warnings.filterwarnings("ignore", message=".*does not reference an nn.Module")
                    try:
                        graph_module.graph.lint()
                    except RuntimeError as error:
                        raise PassError(f"pass {graph_pass.name} left a graph that is not sound: {error}") from error
                graph_module.recompile()
            self._write(f"{stem}-after.py", graph_module)
            log.debug("%s", result.report)
            if ops is not None and (changed := _difference(ops, _ops(graph_module))):
                log.debug("nodes of %s: %s", graph_pass.name, changed)
            reports.append(result.report)
        self.reports = tuple(reports)
        self._sketches = (before, sketch(graph_module))
        return graph_module

    def draw(self, path: Path | str | None = None) -> Picture:
        """The graph before and after the last call, what the passes made in red.

        Args:
            path: an ``.svg``, ``.png`` or ``.pdf`` file to write.

        Raises:
            PassError: the pipeline has not been called yet.
        """
        if self._sketches is None:
            raise PassError("there is nothing to draw: call the pipeline on a graph first")
        before, after = self._sketches
        title = ", ".join(p.name for p in self.passes)
        picture = Picture(title, drawing_of(before), drawing_of(after, new=True))
        if path is not None:
            picture.save(path)
        return picture

    def _write(self, name: str, graph_module: GraphModule) -> None:
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / name).write_text(graph_text(graph_module))


def _ops(graph_module: GraphModule) -> Counter[str]:
    """How many nodes of a graph call what."""
    calls = (node for node in graph_module.graph.nodes if node.op.startswith("call_"))
    return Counter(getattr(node.target, "__name__", str(node.target)) for node in calls)


def _difference(before: Counter[str], after: Counter[str]) -> str:
    changed = [op for op in sorted(before | after) if before[op] != after[op]]
    return ", ".join(f"{op} {before[op]} -> {after[op]}" for op in changed)
