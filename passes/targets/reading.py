"""What a graph reads: the parameters that its nodes carry, and the modules that made them."""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from fxpeft.passes.base import attribute, node_of
from fxpeft.passes.meta import READS

aten = torch.ops.aten
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t, "t"}
_SWAPS = {aten.transpose.int, torch.transpose, "transpose"}
_PERMUTES = {aten.permute.default, torch.permute, "permute"}
_PICKS = {aten.index.Tensor, aten.index_select.default, torch.index_select, operator.getitem, "index_select"}
_ROOT = re.compile(r"^([LG]\[['\"]\w+['\"]\]|_export_root)(\.|$)")  # Dynamo's names for the root module


class Unsupported(Exception):
    """Looks like a target, but can't be rewritten; the message says why."""


class Weight(NamedTuple):
    """A weight as a graph has it.

    Args:
        path: its dotted name. shape: as it is stored. transposed: whether the graph swaps its last two dimensions.
        picks: of a stack of weights, the numbers of those that are used, in order; ``None``: all of them.
    """

    path: str
    shape: torch.Size
    transposed: bool
    picks: Node | None = None


class View(NamedTuple):
    """What an operand is a view of: a node, which dimensions were swapped, and what picked along the first."""

    node: Node | None
    swaps: tuple[tuple[int, int], ...]
    picks: Node | None


def argument(node: Node, place: tuple[int, str], default: Any = None) -> Any:
    """A node's argument by its place and name."""
    index, name = place
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def view_of(operand: Any) -> View:
    """The read that an operand is a view of, or the node where views end."""
    node, picks = node_of(operand), None
    swaps: list[tuple[int, int]] = []
    while node is not None and read_path(node) is None and node.op in ("call_function", "call_method"):
        swap, picked = _swap(node), _picked(node)
        if swap is not None:
            swaps += [swap] if swap != (0, 0) else []
        elif picked is not None and picks is None:
            picks = picked
        else:
            break
        node = node_of(node.args[0])
    return View(node, tuple(swaps), picks)


def _swap(node: Node) -> tuple[int, int] | None:
    """The dimensions that a node swaps, (0, 0) for none; ``None``: it does something else."""
    if node.target in _TRANSPOSES:
        return (-2, -1)
    rest: tuple[Any, ...] = node.args[1:]
    if node.target in _SWAPS and len(rest) == 2:
        return rest
    if node.target in _PERMUTES and rest:
        order = list(rest[0]) if isinstance(rest[0], list | tuple) else list(rest)
        least = list(range(len(order)))
        if order == least:
            return (0, 0)
        return (-2, -1) if order == [*least[:-2], least[-1], least[-2]] else None
    return None


def _picked(node: Node) -> Node | None:
    """What a node picks with along the first dimension; ``None``: it does something else."""
    if node.target not in _PICKS or len(node.args) < 2:
        return None
    index: Any = node.args[1]
    if node.target in (aten.index.Tensor, operator.getitem):
        if isinstance(index, list | tuple):
            index = index[0] if len(index) == 1 else None
        return node_of(index)
    return node_of(node.args[2]) if index == 0 and len(node.args) > 2 else None


def weight_of(graph_module: GraphModule, operand: Any) -> Weight:
    """The weight that an operand is.

    Raises:
        Unsupported: it is none that a module has.
    """
    view = view_of(operand)
    path = None if view.node is None else read_path(view.node)
    if view.node is None or path is None:
        raise Unsupported("its weight is computed in the graph, not read from a module")
    shape = value_of(graph_module, view.node).shape
    last = {len(shape) - 2, len(shape) - 1}
    if any({a % len(shape), b % len(shape)} != last for a, b in view.swaps):
        raise Unsupported("its weight is read with its dimensions in another order")
    return Weight(path, shape, len(view.swaps) % 2 == 1, view.picks)


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
