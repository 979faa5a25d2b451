"""The targets of a captured program: where they are, and the weights that each works with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxpeft.model.skeleton import Outline
from fxpeft.passes.base import attribute
from fxpeft.passes.meta import SITE, TARGET, Located
from fxpeft.passes.rewrite.subgraphs import calls, closed, walk
from fxpeft.passes.targets.match import (
    MatchPass,
    operands,
    read_target,
)
from fxpeft.passes.targets.reading import Unsupported, calling_module, read_path, value_of, view_of


class Attributes:
    """The tensors of a graph module by dotted name."""

    def __init__(self, graph_module: GraphModule, examples: Mapping[str, Tensor]) -> None:
        self.graph_module = graph_module
        self.examples = examples

    def __getitem__(self, path: str) -> Any:
        return self.examples[path] if path in self.examples else attribute(self.graph_module, path)


@dataclass(frozen=True)
class Found:
    """A matched node: its graph, its weight and bias."""

    graph_module: GraphModule
    node: Node
    outline: Outline

    @property
    def target(self) -> Located:
        """What the node is annotated with."""
        return TARGET.of(self.node)


def match_sites(graph_module: GraphModule, tensors: Any) -> tuple[dict[str, list[Found]], list[str]]:
    """Every target of the program, in all its graphs, and what was left out with the reason."""
    found: dict[str, list[Found]] = {}
    skipped = []
    for _, each in walk(graph_module):
        result = MatchPass(lambda site: True)(each)
        skipped += [f"{s.site or '(root)'}: {s.reason}" for s in result.report.skipped]
        for node in each.graph.nodes:
            target = TARGET.get(node)
            if target is None or SITE.has(node) or node.op == "output":
                continue
            if target.kind.kernel and _pads_itself(node, target):
                skipped.append(f"{target.site}: it pads its input itself, and the adapter's A would see the padding")
                continue
            found.setdefault(target.site, []).append(Found(each, node, _outline(each, node, target, tensors)))
    # a module's parameters in its own order, where that is known: PEFT's keys count on it
    order = {path: at for at, path in enumerate(tensors)} if isinstance(tensors, dict) else {}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], -1))), skipped


def read_otherwise(graph_module: GraphModule, sites: Collection[str]) -> dict[str, str]:
    """Parameters, of those named, that a program reads where no rewrite reaches -> where: an update would be lost."""
    found = {}
    for _, each in walk(graph_module):
        entered = {call.node for call in calls(each)}
        for node in each.graph.nodes:
            path = read_path(node)
            for user in _readers(node) if path in sites else ():
                target = TARGET.get(user)
                if user not in entered and (target is None or target.site != path) and user.op != "output":
                    found[str(path)] = f"is read by {user.target} too, where a rewrite can't reach"
    return found


def _readers(read: Node, view: Node | None = None) -> Iterator[Node]:
    """What computes with what a node reads, past the views of it."""
    for user in (view or read).users:
        if view_of(user).node is read:
            yield from _readers(read, user)
        else:
            yield user


def unread_stacks(graph_module: GraphModule, found: Collection[str]) -> list[str]:
    """Stacks of matrices that are no targets, and what reads them."""
    lines = []
    for _, each in walk(graph_module):
        for node in each.graph.nodes:
            path = read_path(node)
            if path and path not in found and getattr(value_of(each, node), "ndim", 0) == 3:
                lines += [f"{path}: {user.target} reads it, of which no operation is known" for user in _readers(node)]
    return list(dict.fromkeys(lines))


def closed_sites(graph_module: GraphModule) -> dict[str, str]:
    """Sites with a target in a body that can't be entered -> why not: adapters there would be lost without a word."""
    found = {}
    for _, each in walk(graph_module):
        for node, bodies in closed(each):
            graphs = [g for body in bodies for g in body.modules() if isinstance(g, GraphModule)]
            inside = [n for g in graphs for n in g.graph.nodes]
            if any(_is_target(g, n) for g in graphs for n in g.graph.nodes):
                paths = (read_path(n) for n in (*node.all_input_nodes, *inside))
                sites = {p.rpartition(".")[0] for p in paths if p and p.rpartition(".")[2] == "weight"}
                found.update(dict.fromkeys(sites, f"is used in a body of {node.target} that can't be entered"))
    return found


def _is_target(gm: GraphModule, node: Node) -> bool:
    try:
        return read_target(gm, node) is not None
    except Unsupported:
        return True


def _pads_itself(node: Node, target: Located) -> bool:
    source = node.args[target.input] if len(node.args) > target.input else None
    return isinstance(source, Node) and source.op == "call_function" and calling_module(source) == target.site != ""


def _outline(gm: GraphModule, node: Node, target: Located, tensors: Any) -> Outline:
    weight, flip, bias = operands(gm, node)
    if isinstance(weight, Node):
        view = view_of(weight)
        assert view.node is not None
        weight, flip = view.node, flip != (len(view.swaps) % 2 == 1)
    value = _tensor(gm, weight, tensors)
    if target.kind.is_parameter:  # a stack is kept as it is stored
        return Outline(target.kind, value.detach())
    own = None if bias is None else _tensor(gm, bias, tensors)
    return Outline(target.kind, (value.t() if flip else value).detach(), None if own is None else own.detach())


def _tensor(gm: GraphModule, read: Node | str, tensors: Any) -> Tensor:
    """A weight by the node that reads it, or by its name where a module is called."""
    if isinstance(read, str):
        found: Tensor = attribute(gm, read)
        return found
    if read.op == "get_attr" and hasattr(gm, str(read.target).partition(".")[0]):
        return attribute(gm, str(read.target))  # type: ignore[no-any-return]
    return tensors[read_path(read)]  # type: ignore[no-any-return]
