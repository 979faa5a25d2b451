"""Form: a graph with slots' updates as one node each in; out, each in the form for the rows that its input has."""

from __future__ import annotations

from torch.fx import GraphModule

from fxpeft.passes.base import GraphPass, Report, RewriteResult, tensor_of
from fxpeft.passes.meta import SITE
from fxpeft.passes.targets.update import is_row, update, update_row, update_rows


class FormPass(GraphPass):
    """Choose :func:`~fxpeft.passes.targets.update.update_row` where a site's output is known to be one row.

    A site whose rows are not known, or known by a symbol only, multiplies. Live modules need no pass: theirs is chosen
    while Dynamo traces them.
    """

    name = "form"

    def call(self, graph_module: GraphModule) -> RewriteResult:
        nodes, matched = graph_module.graph.nodes, []
        bases = {node.name: node for node in nodes}
        for node in nodes:
            if node.op == "call_function" and node.target is update:
                base = bases.get(SITE.get(node) or "")
                value = None if base is None else tensor_of(base)
                node.target = update_row if value is not None and is_row(value.shape[:-1]) else update_rows
                matched.append(f"{node.name}: {node.target.__name__}")
        return RewriteResult(graph_module, bool(matched), Report(self.name, tuple(matched), (), len(nodes), len(nodes)))
