"""Lift: a graph that reads an adapter's operands as attributes in; out, each is a placeholder."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, attribute
from fxpeft.passes.meta import INPUTS, LIFTED, OPERAND, REDIRECT, REWRITE, SITE
from fxpeft.passes.rewrite.inject import get_attr, install, rename
from fxpeft.passes.rewrite.subgraphs import Call, calls
from fxpeft.passes.torch_private import has_plain_arguments

HANDED = ("operand",)  # as REWRITE: an adapter's operand on its way into a body


@dataclass
class LiftPass(GraphPass):
    """Make placeholders of the operands that inject and redirect installed; a tensor that is read twice gets one.

    Args:
        place: which placeholder of the graph a new one follows, given its tensor; ``None``: the last one.
        placed: told each new one, with its tensor.

    After a run ``lifted`` maps the placeholders' names to (path, tensor), in the graph's order.
    """

    name = "lift"
    place: Callable[[GraphModule, torch.Tensor], Node | None] = lambda gm, tensor: None
    lifted: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    placed: Callable[[Node, torch.Tensor], None] = lambda node, tensor: None
    _last: Node | None = field(default=None, init=False, repr=False)

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph, before = graph_module.graph, len(graph_module.graph.nodes)
        made: dict[Any, Node] = {}
        paths: set[str] = set()
        self.lifted, self._last = {}, last_placeholder(graph_module)
        for node in list(graph.nodes):
            if node.op != "get_attr" or not OPERAND.has(node):
                continue
            path = str(node.target)
            tensor = attribute(graph_module, path)
            paths.add(path)
            key = id(tensor), REDIRECT.get(node)
            if key not in made:
                made[key] = self._placeholder(graph_module, node, path, tensor)
            node.replace_all_uses_with(made[key])
            graph.erase_node(node)
        for path in paths:
            remove(graph_module, path)
        report = Report(self.name, tuple(self.lifted), (), before, len(graph.nodes))
        return RewriteResult(graph_module, bool(made), report)

    def _placeholder(self, gm: GraphModule, node: Node, path: str, tensor: torch.Tensor) -> Node:
        after = self.place(gm, tensor) or self._last
        prefix = "p_" if isinstance(tensor, torch.nn.Parameter) else "b_"
        name = prefix + re.sub(r"\W", "_", path)
        context = gm.graph.inserting_after(after) if after else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        with context:
            new = gm.graph.placeholder(name)
        if after is self._last:
            self._last = new
        self.placed(new, tensor)
        new.target = new.name
        new.meta = {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta", REDIRECT.name)}
        LIFTED.set(new, path)
        self.lifted[new.name] = (path, tensor)
        return new


def last_placeholder(graph_module: GraphModule) -> Node | None:
    """The last placeholder, or ``None``."""
    return next((n for n in reversed(graph_module.graph.nodes) if n.op == "placeholder"), None)


def remove(root: torch.nn.Module, path: str) -> None:
    """Delete an attribute below ``root`` and the plain modules that are empty then; fine if it is gone."""
    owner_path, _, leaf = path.rpartition(".")
    try:
        delattr(attribute(root, owner_path), leaf)
    except AttributeError:
        return
    while owner_path:
        module = attribute(root, owner_path)
        if type(module) is not torch.nn.Module or module._parameters or module._buffers or module._modules:
            return
        owner_path, _, leaf = owner_path.rpartition(".")
        delattr(attribute(root, owner_path), leaf)


def lift_bodies(graph_module: GraphModule) -> None:
    """Hand the operands that bodies of higher-order operators read in from outside, through every level."""
    for call in calls(graph_module):
        for number, body in enumerate(call.bodies()):
            lift_bodies(body)
            lift = LiftPass()
            if lift(body).modified:
                for name, (path, tensor) in lift.lifted.items():
                    _hand_in(call, number, name, path, tensor)
            body.graph.lint()
            body.recompile()


def _hand_in(call: Call, number: int, name: str, path: str, tensor: torch.Tensor) -> None:
    gm = call.graph_module
    install(gm, path, tensor)
    with gm.graph.inserting_before(call.node):
        read = get_attr(gm.graph, path)
    inside = next(n for n in call.bodies()[number].graph.nodes if n.name == name)
    SITE.set(read, call.node.name)
    REWRITE.set(read, HANDED)
    OPERAND.set(read, True)
    if "val" in inside.meta:
        read.meta["val"] = inside.meta["val"]
    call.append(read)
    for other, body in enumerate(call.bodies()):
        if other != number:  # all branches take the same operands
            after = last_placeholder(body)
            assert after is not None
            with body.graph.inserting_after(after):
                extra = body.graph.placeholder(name)
            extra.target = extra.name
            extra.meta = dict(inside.meta)
            REDIRECT.drop(extra)


def drop_unused(graph_module: GraphModule) -> list[Node]:
    """The inverse, after eject: hand nothing into bodies that they don't read any more.

    Returns:
        The graph's own lifted placeholders that nothing reads; whoever calls the graph has to know that they go.
    """
    for call in calls(graph_module):
        for body in call.bodies():
            drop_unused(body)
        _drop_operands(call)
    gone = [n for n in graph_module.graph.nodes if n.op == "get_attr" and REWRITE.get(n) == HANDED and not n.users]
    for node in gone:
        graph_module.graph.erase_node(node)
    read = {n.target for n in graph_module.graph.nodes if n.op == "get_attr"}
    for path in {str(node.target) for node in gone} - read:
        remove(graph_module, path)
    return [n for n in graph_module.graph.nodes if LIFTED.has(n) and not n.users]


def _drop_operands(call: Call) -> None:
    columns = list(zip(*([p for p, _ in call.inputs(b)] for b in call.bodies()), strict=True))
    for number in reversed(range(len(columns))):
        if all(LIFTED.has(n) and not n.users for n in columns[number]):
            for placeholder in columns[number]:
                placeholder.graph.erase_node(placeholder)
            call.drop(number)
    for body in call.bodies():
        body.graph.lint()
        body.recompile()


def hand_in(graph_module: GraphModule) -> None:
    """Lift for a plain graph module: its operands come in one more argument, ``adapters``, a dict by name.

    Raises:
        PassError: the graph takes nested arguments, whose structure is not in the graph.
    """
    graph = graph_module.graph
    if not has_plain_arguments(graph):
        raise PassError("this graph module's arguments are nested; rewrite the ExportedProgram it came from")
    if any(n.op == "placeholder" and n.target == "adapters" for n in graph.nodes):
        raise PassError("the graph has an argument named 'adapters' already; eject that adapter first")
    argument: Node | None = None
    first: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" or not OPERAND.has(node):
            continue
        path = str(node.target)
        if argument is None:
            last = last_placeholder(graph_module)
            context = graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes)))
            with context:
                argument = graph.placeholder("adapters")
            LIFTED.set(argument, "adapters")
        with graph.inserting_before(node):
            item = graph.call_function(operator.getitem, (argument, path.partition(".")[2]))
        item.meta = dict(node.meta)
        first[path.partition(".")[2]] = attribute(graph_module, path)
        node.replace_all_uses_with(item)
        graph.erase_node(node)
        names[node.name] = item.name
    rename(graph, names)
    for key in first:
        for container in ("adapters", "slot"):
            if hasattr(graph_module, container):
                remove(graph_module, f"{container}.{key}")
    INPUTS.set(graph_module, first)
