"""Eject: a rewritten graph in; out, exactly the graph that inject and redirect were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, Report, RewriteResult, Skip, attribute
from fxpeft.passes.meta import OPERAND, ORIGIN, REDIRECT, SITE, TARGET
from fxpeft.passes.rewrite.inject import Takers, reroute, takers_of
from fxpeft.passes.targets.reading import read_path


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
        gone: set[str] = set()  # what the erased nodes read
        nodes, takers = list(graph.nodes), takers_of(graph)
        by_name = {node.name: node for node in nodes}
        made: dict[str, list[Node]] = {}
        for node in nodes:
            if (site := SITE.get(node)) is not None:
                made.setdefault(site, []).append(node)
        for node in nodes:
            target = TARGET.get(node)
            if target is None or node.op == "output":
                continue
            if not self.select(target.site):
                skipped.append(Skip(target.site, "not selected"))
                continue
            origin = ORIGIN.drop(node)
            if origin is None:
                skipped.append(Skip(target.site, "holds no adapter"))
                continue
            new = made.get(node.name, [])
            gone |= _restore(node, new, target.input, by_name[origin.input], by_name[origin.output], takers)
            matched.append(target.site)
        modified = bool(matched)
        for node in list(graph.nodes):
            if REDIRECT.has(node) and node.users:
                old = by_name[REDIRECT.of(node)]
                site = str(read_path(old)).rpartition(".")[0]
                if self.select(site):
                    node.replace_all_uses_with(old)
                    modified = True
                    if node.op == "get_attr":
                        graph.erase_node(node)
                        gone.add(str(node.target))
        _prune(graph_module, gone)
        report = Report(self.name, tuple(matched), tuple(skipped), before, len(graph.nodes))
        return RewriteResult(graph_module, modified, report)


def _restore(node: Node, new: list[Node], place: int, source: Node, output: Node, takers: Takers) -> set[str]:
    """Take one site's new nodes out; its input, at ``place``, is ``source`` again. Returns the paths that they read."""
    if output is not node:
        reroute(output, node, new, takers)
    if place < len(node.args):
        node.update_arg(place, source)
    else:
        node.update_kwarg("input", source)
    # what a rewrite reads of the target itself stays: a called module's weight, for instance
    gone = _paths(n for n in new if OPERAND.has(n) or n.op == "call_module")
    for made_node in reversed(new):
        node.graph.erase_node(made_node)
    return gone


def _paths(nodes: Iterable[Node]) -> set[str]:
    return {str(n.target) for n in nodes if n.op in ("get_attr", "call_module")}


def _prune(gm: GraphModule, gone: set[str]) -> None:
    """Drop the operands that no node reads any more, and the plain modules that are empty then."""
    plain = vars(nn.Module()).keys()
    for path in gone - _paths(gm.graph.nodes):
        delattr(attribute(gm, path.rpartition(".")[0]), path.rpartition(".")[2])
        while path := path.rpartition(".")[0]:
            module = attribute(gm, path)
            holds = module._parameters or module._buffers or module._modules or vars(module).keys() - plain
            if type(module) is not nn.Module or holds:
                break
            delattr(attribute(gm, path.rpartition(".")[0]), path.rpartition(".")[2])
