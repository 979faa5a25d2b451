"""Fold: a graph with slots in; out, the same for slots that hold nothing: their arithmetic is gone."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxpeft.passes.backend.backend_pass import IDLE, BackendPass, Context
from fxpeft.passes.base import Report, RewriteResult, node_of, tensor_of
from fxpeft.passes.meta import FOLDED
from fxpeft.passes.rewrite.subgraphs import Call, calls

# of zeros they make zeros, and of ones, ones
_SAME = {"type_as", "narrow", "view", "unsqueeze", "to", "t", "permute", "transpose", "flatten", "unflatten", "movedim"}
_LINEAR = {F.linear, torch.matmul, F.conv1d, F.conv2d, F.conv3d}


class FoldInactivePass(BackendPass):
    """Every slot's subgraph is the target's own output when d and the shift are zero and the gains are one.

    A graph break, a checkpoint's body or a layer compiled on its own is a graph like any other. What
    no longer has a reader is left for :class:`~fxpeft.passes.CleanPass`.
    """

    name = uuid = "fold_inactive"
    graphs = (IDLE,)

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        known = {n: context.values[n.name] for n in graph_module.graph.nodes if n.name in context.values}
        folded = _fold(graph_module, known)
        return RewriteResult(graph_module, bool(folded), Report(self.name, tuple(folded)))


def _fold(gm: GraphModule, values: dict[Node, int]) -> list[str]:
    folded: list[str] = []
    bodies: dict[Node, list[Call]] = {}
    for call in calls(gm):
        bodies.setdefault(call.node, []).append(call)
    sources: dict[Node, Node] = {}  # a node -> the one that it equals, but for a wider dtype
    for node in gm.graph.nodes:
        if node in bodies:
            folded += [name for call in bodies[node] for name in _fold_bodies(call, values)]
        elif node.op in ("call_function", "call_method"):
            value, same = _simplify(node, values)
            if value is not None:
                values[node] = value
            source = None if same is None else sources.get(same, same)
            if source is None:
                continue
            if _alike(node, source):
                node.replace_all_uses_with(source)
                FOLDED.set(node, True)
                folded.append(node.name)
            elif _wider(node, source):
                sources[node] = source
    return folded


def _fold_bodies(call: Call, values: Mapping[Node, int]) -> list[str]:
    folded = []
    for body in call.bodies():
        given = ((placeholder, node_of(operand)) for placeholder, operand in call.inputs(body))
        inner = {placeholder: values[n] for placeholder, n in given if n is not None and n in values}
        here = _fold(body, inner)
        if here:
            folded += here
            body.recompile()
    return folded


def _simplify(node: Node, values: Mapping[Node, int]) -> tuple[int | None, Node | None]:
    """The number that all elements of a node's result are, and the node that it equals, each if known."""
    first, second = (node_of(node.args[i]) if len(node.args) > i else None for i in (0, 1))
    a, b = values.get(first) if first else None, values.get(second) if second else None
    if (node.op == "call_method" and node.target in _SAME) or node.target is torch.narrow:
        return a, first if node.target == "type_as" and a is None else None
    if node.op == "call_method" and node.target == "sum":
        return (0 if a == 0 else None), None
    if node.target in (operator.mul, torch.mul):
        if 0 in (a, b):
            return 0, None
        return (1 if a == b == 1 else None), first if b == 1 else second if a == 1 else None
    if node.target in (operator.add, torch.add) and not node.kwargs:
        return (0 if a == b == 0 else None), first if b == 0 else second if a == 0 else None
    if node.target is torch.where and len(node.args) == 3 and node.args[1] == 0:
        kept = node_of(node.args[2])
        return (0 if kept is not None and values.get(kept) == 0 else None), None
    if node.target is torch.baddbmm and not node.kwargs:
        factors = {values.get(n) for arg in node.args[1:3] if (n := node_of(arg)) is not None}
        return None, first if 0 in factors else None
    if node.target in (torch.matmul, torch.bmm) and b == 0:
        return 0, None
    if node.target in _LINEAR and a == 0:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return (0, None) if bias is None else (None, None)
    return None, None


def _wider(node: Node, other: Node) -> bool:
    """Whether a node's dtype holds all that the other's does, at the same shape."""
    a, b = tensor_of(node), tensor_of(other)
    return (
        a is not None
        and b is not None
        and str(a.shape) == str(b.shape)
        and (torch.promote_types(a.dtype, b.dtype) is a.dtype)
    )


def _alike(node: Node, other: Node) -> bool:
    """Whether one may stand for the other: the same shape, dtype and device."""
    a, b = tensor_of(node), tensor_of(other)
    if a is None or b is None:
        return False
    return a.dtype is b.dtype and a.device == b.device and str(a.shape) == str(b.shape)
