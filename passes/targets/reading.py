"""What a graph reads: the parameters that its nodes carry, and the modules that made them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from fxpeft.passes.base import attribute, node_of
from fxpeft.passes.meta import READS

aten = torch.ops.aten
_TRANSPOSES = {
    aten.t.default, aten.numpy_T.default, torch.t, aten.transpose.int, aten.permute.default, torch.transpose,
    torch.permute,
}  # fmt: skip
_TRANSPOSE_METHODS = {"t", "transpose", "permute"}
_ROOT = re.compile(r"^([LG]\[['\"]\w+['\"]\]|_export_root)(\.|$)")  # Dynamo's names for the root module


class Unsupported(Exception):
    """Looks like a target, but can't be rewritten; the message says why."""


class Weight(NamedTuple):
    """A weight as a graph has it: whose, its stored shape, and whether the graph transposes it."""

    path: str
    shape: torch.Size
    transposed: bool


def argument(node: Node, place: tuple[int, str], default: Any = None) -> Any:
    """A node's argument by its place and name."""
    index, name = place
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def stored(operand: Any) -> tuple[Node | None, bool]:
    """The node that an operand is a view of, and whether the graph transposes that."""
    node, transposed = node_of(operand), False
    while node is not None and read_path(node) is None:
        if node.target not in (_TRANSPOSE_METHODS if node.op == "call_method" else _TRANSPOSES):
            break
        node, transposed = node_of(node.args[0]), not transposed
    return node, transposed


def weight_of(graph_module: GraphModule, operand: Any) -> Weight:
    """The weight that an operand is.

    Raises:
        Unsupported: it is none that a module has.
    """
    node, transposed = stored(operand)
    path = None if node is None else read_path(node)
    if node is None or path is None:
        raise Unsupported("its weight is computed in the graph, not read from a module")
    return Weight(path, value_of(graph_module, node).shape, transposed)


def read_path(node: Node) -> str | None:
    """The dotted name of the attribute that a node reads or, as a placeholder, carries; ``None`` for any other."""
    path = READS.get(node)
    return str(node.target) if path is None and node.op == "get_attr" else path


def value_of(graph_module: GraphModule, node: Node) -> Any:
    """The attribute that a node reads, or the example that stands for a placeholder's."""
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target))
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def calling_module(node: Node) -> str:
    """Dotted name of the innermost module whose forward made a node, as far as the graph recorded it."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return _ROOT.sub("", path)


def owner(node: Node, site: str) -> str:
    """The calling module where the graph recorded it: with tied weights the weight's name is another's."""
    path = calling_module(node)
    # a module that reads the weight of one below it, without calling it, is not the weight's owner
    return site if not path or site.startswith(f"{path}.") else path
