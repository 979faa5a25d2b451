"""Run passes over a graph: any graph module in, the rewritten one and a report per pass out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch.fx import GraphModule

from fxpeft.passes.base import GraphPass, Report

log = logging.getLogger(__name__)


def graph_text(graph_module: GraphModule) -> str:
    """The graph as Python source, the form in which a person reads it."""
    return graph_module.graph.python_code("self").src.strip() + "\n"


class Pipeline:
    """Passes in order, each linted and recompiled if it changed the graph.

    Args:
        passes: the passes; each has a ``name``.
        dump: a folder that receives ``01-match-before.py``, ``01-match-after.py``, ... (the
            graph as source) for every run; made where missing.

    After a call, :attr:`reports` holds one :class:`Report` per pass of that call.
    """

    def __init__(self, passes: Sequence[GraphPass], *, dump: Path | str | None = None) -> None:
        self.passes = tuple(passes)
        self.dump = None if dump is None else Path(dump)
        self.reports: tuple[Report, ...] = ()

    def __call__(self, graph_module: GraphModule) -> GraphModule:
        reports = []
        for number, graph_pass in enumerate(self.passes, start=1):
            stem = f"{number:02d}-{graph_pass.name}"
            self._write(f"{stem}-before.py", graph_module)
            result = graph_pass(graph_module)
            graph_module = result.graph_module
            if result.modified:
                with warnings.catch_warnings():
                    # lint knows parameters, buffers and modules; a slot's active rank is a plain object
                    warnings.filterwarnings("ignore", message=".*does not reference an nn.Module")
                    graph_module.graph.lint()
                graph_module.recompile()
            self._write(f"{stem}-after.py", graph_module)
            log.debug("%s", result.report)
            reports.append(result.report)
        self.reports = tuple(reports)
        return graph_module

    def _write(self, name: str, graph_module: GraphModule) -> None:
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / name).write_text(graph_text(graph_module))
