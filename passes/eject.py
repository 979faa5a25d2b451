"""Eject: a rewritten graph in; out, exactly the graph that inject and redirect were given."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, Report, RewriteResult, Skip
from fxpeft.passes.inject import SITE, Origin
from fxpeft.passes.match import TARGET, Target
from fxpeft.passes.redirect import REDIRECT


class EjectPass(GraphPass):
    """Take the adapter subgraphs out again: nodes, their names and order are as before inject.

    Args:
        select: which sites; all by default.
    """

    name = "eject"

    def __init__(self, select: Callable[[str], bool] = lambda site: True) -> None:
        self.select = select

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph = graph_module.graph
        before = len(graph.nodes)
        matched, skipped = [], []
        containers: set[str] = set()
        for node in list(graph.nodes):
            target: Target | None = node.meta.get(TARGET)
            if target is None or node.op == "output":
                continue
            if not self.select(target.site):
                skipped.append(Skip(target.site, "not selected"))
                continue
            origin = node.meta.pop(SITE, None)
            if not isinstance(origin, Origin):
                skipped.append(Skip(target.site, "holds no adapter"))
                continue
            _restore(graph_module, node, target, origin)
            matched.append(target.site)
            containers.update(origin.containers)
        modified = bool(matched)
        for node in list(graph.nodes):
            if REDIRECT in node.meta:
                old = next(n for n in graph.nodes if n.name == node.meta[REDIRECT])
                site = str(old.target).rpartition(".")[0]
                if self.select(site):
                    node.replace_all_uses_with(old)
                    graph.erase_node(node)
                    containers.add(str(node.target).split(".")[0])
                    modified = True
        _prune(graph_module, containers)
        report = Report(self.name, tuple(matched), tuple(skipped), before, len(graph.nodes))
        return RewriteResult(graph_module, modified, report)


def _restore(gm: GraphModule, node: Node, target: Target, origin: Origin) -> None:
    by_name = {n.name: n for n in gm.graph.nodes}
    new = [n for n in gm.graph.nodes if n.meta.get(SITE) == node.name]
    output = by_name[origin.output]
    if output is not node:
        output.replace_all_uses_with(node, delete_user_cb=lambda user: user not in new)
    source = by_name[origin.input]
    if target.input < len(node.args):
        node.update_arg(target.input, source)
    else:
        node.update_kwarg("input", source)
    for made_node in reversed(new):
        gm.graph.erase_node(made_node)


def _prune(gm: GraphModule, containers: set[str]) -> None:
    """Drop the operands that no node reads any more, and the containers that are empty then."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for container in containers:
        root = getattr(gm, container, None)
        if isinstance(root, nn.Module) and not any(path.split(".")[0] == container for path in used):
            delattr(gm, container)
