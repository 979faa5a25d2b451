"""Redirect: a graph in; out, it reads operands in the place of named attributes (a bias, a weight)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, join
from fxpeft.passes.meta import OPERAND, REDIRECT
from fxpeft.passes.rewrite.inject import get_attr, install
from fxpeft.passes.targets.reading import read_path


class RedirectPass(GraphPass):
    """Replace reads of attributes.

    Args:
        redirects: site -> {attribute: (path of the operand below the container, its value)}.
        container: as in :class:`~fxpeft.passes.Rewrite`.

    Raises:
        PassError: the graph does not read the attribute on its own.
    """

    name = "redirect"

    def __init__(self, redirects: Mapping[str, Mapping[str, tuple[str, Any]]], *, container: str = "adapters") -> None:
        self.redirects = redirects
        self.container = container

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph, matched = graph_module.graph, []
        before = len(graph.nodes)
        first = next(n for n in graph.nodes if n.op != "placeholder")
        reads: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if (read_by := read_path(node)) is not None:
                reads.setdefault(read_by, []).append(node)
        done = {n.target for n in graph.nodes if REDIRECT.has(n)}
        for site, attributes in self.redirects.items():
            for attribute, (operand, value) in attributes.items():
                wanted, path = join(site, attribute), join(self.container, site, operand)
                if path in done:
                    continue
                found = reads.get(wanted)
                if not found:
                    raise PassError(
                        f"site {site!r}: the graph doesn't read {attribute!r} on its own, so an adapter can't bring "
                        f"its own {attribute!r} here; use bias='none' or leave this site out"
                    )
                install(graph_module, path, value)
                made = []
                for read in found:
                    place = graph.inserting_before(first) if read.op == "placeholder" else graph.inserting_after(read)
                    with place:
                        new = get_attr(graph, path)
                    read.replace_all_uses_with(new)
                    REDIRECT.set(new, read.name)
                    OPERAND.set(new, True)
                    made.append(new)
                first = next((n for n, read in zip(made, found, strict=True) if read.op == "placeholder"), first)
                reads.setdefault(path, []).extend(made)
                done.add(path)
                matched.append(wanted)
        report = Report(self.name, tuple(matched), (), before, len(graph.nodes))
        return RewriteResult(graph_module, bool(matched), report)
