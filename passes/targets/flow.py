"""Flow: any graph in; out, its data flow as a small networkx graph of the operations that mix or project.

Views, casts, norms, rotary embeddings, scales, activations and whatever else has one origin lie on the
edges, as ``via``. A vertex is left where

- an input enters (``input``) or an output leaves (``output``),
- a weight is applied: ``linear``, ``embedding``, ``conv``, or ``stacked`` where it has a matrix per expert,
- values of different origins meet: ``sum``, ``product``, ``matmul``, ``topk`` or the operation's own name,
- queries meet keys and values: ``attention``, or ``cross_attention`` where they come from elsewhere,
  whether it was written as one operation or as two products around a softmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import networkx as nx
from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import attribute
from fxpeft.passes.targets.match import read_target
from fxpeft.passes.targets.operations.linear import Linear
from fxpeft.passes.targets.reading import Unsupported
from fxpeft.passes.torch_private import OpOverload, pytree, schema_of

Flow: TypeAlias = "nx.MultiDiGraph[str]"

#: operations that move values and change none
MOVES = frozenset({
    "view", "reshape", "to", "_to_copy", "type_as", "float", "contiguous", "clone", "transpose", "permute", "t",
    "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "slice", "select", "narrow", "chunk", "split",
    "split_with_sizes", "getitem", "detach", "alias", "dropout", "lift_fresh_copy", "index", "repeat_interleave",
    "repeat", "_assert_tensor_metadata",
})  # fmt: skip
#: those of them that leave the memory where it is
_VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "detach",
    "alias", "_unsafe_view",
})  # fmt: skip
ACTIVATIONS = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "sigmoid", "tanh", "erf",
    "mish", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "glu", "swish",
    "gelutanh", "newgeluactivation", "geluactivation",
})  # fmt: skip
_SUMS = frozenset({
    "add", "iadd", "sub", "isub", "rsub", "index_add", "index_put", "scatter_add", "scatter_reduce", "addcmul",
    "addcdiv", "lerp",
})  # fmt: skip
_PRODUCTS = frozenset({"mul", "imul", "div", "truediv"})
_OF_MATRICES = re.compile(r"(?:^|_)(?:mm|bmm|addmm|addbmm|baddbmm|matmul|einsum|linear|mv)(?:_|$)")
_ADDING = frozenset({"addmm", "addbmm", "baddbmm"})  # their first operand is added, not multiplied
_ATTENTIONS = frozenset({
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "flex_attention",
})  # fmt: skip
_TRUTHS = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "logical_and", "logical_or", "logical_not", "isnan",
    "argmax", "argmin", "any", "all",
})  # fmt: skip
_LOOK_UPS = frozenset({"index", "gather", "index_select", "take_along_dim"})  # only what is looked up in has an origin
_PROJECTIONS = ("linear", "embedding", "conv", "stacked")


@dataclass(frozen=True)
class _Value:
    """Where a node's value comes from: a vertex and the way from there, or a parameter, or neither."""

    vertex: str | None = None
    via: tuple[str, ...] = ()
    parameter: str | None = None


def flow_of(graph_module: GraphModule) -> Flow:
    """The data flow of a graph.

    Vertices are named after graph nodes. Attributes of a vertex: ``op``, ``site`` (the module that
    ran it), and where a weight is applied ``kind``. Of an edge: ``index``, the operand's place
    (queries 0, keys 1, values 2), ``via``, the operations on the way, and ``value``, the name of the node that is
    read, or of what it is a view of.
    """
    return _Lift(graph_module).run()


def same_inputs(flow: Flow) -> dict[str, str]:
    """Module that applies a weight -> the first one that reads the same value."""
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    for vertex, attributes in flow.nodes(data=True):
        if attributes["op"] in _PROJECTIONS:
            for *_, edge in flow.in_edges(vertex, data=True):
                if edge["index"] == 0:
                    found.setdefault(attributes["site"], first.setdefault(edge["value"], attributes["site"]))
    return found


def operation(graph_module: GraphModule, node: Node) -> str:
    """A node's operation by its plain name, the same for a function, a method, an ATen overload and a module."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__.lower()
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    target: Any = node.target
    if isinstance(target, OpOverload):
        plain = str(schema_of(target).name).partition("::")[2]
        return plain.strip("_") if plain.endswith("__") else plain.rstrip("_")  # __and__, but _grouped_mm
    return str(getattr(target, "__name__", target)).strip("_")


def owner_of(node: Node) -> str:
    """Dotted name of the module that ran a node, where the graph recorded it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0]).removeprefix("L['self']").removeprefix(".")
    return path.partition("@")[0]  # "@1" counts the calls


class _Lift:
    """One walk over the nodes in their order."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.gm = graph_module
        self.flow: Flow = nx.MultiDiGraph()
        self.values: dict[Node, _Value] = {}
        self.scores: set[str] = set()  # vertices that an attention has taken over

    def run(self) -> Flow:
        for node in self.gm.graph.nodes:
            self.values[node] = self.value(node)
        self._tell_cross_attention()
        self._drop_scores()
        return self.flow

    def value(self, node: Node) -> _Value:
        if node.op == "placeholder":
            return self.vertex(node, "input", ())
        if node.op == "get_attr":
            held = _find(self.gm, str(node.target))
            return _Value(parameter=str(node.target)) if isinstance(held, nn.Parameter) else _Value()
        operands = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]
        if node.op == "output":
            return self.vertex(node, "output", operands)
        try:
            target = read_target(self.gm, node)
        except Unsupported:
            target = None
        if target is not None and not target.kind.is_parameter:
            source = node.args[target.input] if target.input < len(node.args) else node.kwargs["input"]
            site = owner_of(node) or target.site
            return self.vertex(node, target.kind.family, [source], site=site, kind=target.kind)
        return self.other(node, operation(self.gm, node), operands)

    def other(self, node: Node, op: str, operands: Sequence[Node]) -> _Value:
        values = [self.values[n] for n in operands]
        if op in _TRUTHS:
            return _Value()
        if op in _ATTENTIONS:
            return self.vertex(node, "attention", operands)
        if op in _LOOK_UPS:
            values, operands = values[:1], operands[:1]
        origins = list(dict.fromkeys(v.vertex for v in values if v.vertex is not None))
        if op == "topk":
            return self.vertex(node, op, operands)
        if _OF_MATRICES.search(op):
            if op in _ADDING:
                operands, values = operands[1:], values[1:]
            weight = next((v.parameter for v in values if v.vertex is None and v.parameter is not None), None)
            if weight is not None and origins:
                return self.projection(node, weight, operands)
            attended = self.attended(node, values, operands)
            if attended is not None:
                return attended
            if len(origins) > 1 or (op != "linear" and sum(v.vertex is not None for v in values) > 1):
                return self.vertex(node, "matmul", operands)
        if len(origins) > 1:
            name = "sum" if op in _SUMS else "product" if op in _PRODUCTS else op
            return self.vertex(node, name, operands)
        via = tuple(dict.fromkeys((*(step for v in values for step in v.via), op)))
        if origins:
            return _Value(origins[0], via)
        parameter = next((v.parameter for v in values if v.parameter is not None), None)
        return _Value(parameter=parameter, via=via)

    def projection(self, node: Node, weight: str, operands: Sequence[Node]) -> _Value:
        """A product with a parameter that no kind describes: a matrix per expert, an einsum."""
        stacked = _find(self.gm, weight).ndim > 2
        site = owner_of(node) or weight.rpartition(".")[0]
        inputs = [n for n in operands if self.values[n].vertex is not None][:1]
        shapes = [getattr(n.meta.get("val"), "shape", None) for n in (*inputs, node)]
        kind = None if stacked or None in shapes else Linear(int(shapes[0][-1]), int(shapes[1][-1]))  # type: ignore[index]
        return self.vertex(node, "stacked" if stacked else "linear", inputs, site=site, kind=kind)

    def attended(self, node: Node, values: Sequence[_Value], operands: Sequence[Node]) -> _Value | None:
        """``softmax(q k) v``, as one vertex; ``None`` for any other product."""
        for at, value in enumerate(values):
            if value.vertex is None or "softmax" not in value.via:
                continue
            for product in self.products(value.vertex):
                sides = {d["index"]: u for u, _, d in self.flow.in_edges(product, data=True)}
                others = [n for i, n in enumerate(operands) if i != at and self.values[n].vertex is not None]
                if len(sides) < 2 or not others:
                    continue
                made = self.vertex(node, "attention", ())
                self.scores |= {product, value.vertex}
                for u, _, data in list(self.flow.in_edges(product, data=True)):
                    self.flow.add_edge(u, node.name, **data)
                self.edge(others[0], node.name, 2)
                return made
        return None

    def products(self, vertex: str) -> list[str]:
        """The products of queries and keys that scores come from; masks and position biases may be added."""
        op = self.flow.nodes[vertex]["op"]
        if op == "matmul":
            return [vertex]
        if op not in ("sum", "where"):
            return []
        return [p for p in self.flow.predecessors(vertex) if self.flow.nodes[p]["op"] == "matmul"]

    def vertex(self, node: Node, op: str, operands: Iterable[Any], **attributes: Any) -> _Value:
        self.flow.add_node(node.name, op=op, **{"site": owner_of(node), "kind": None, **attributes})
        for index, operand in enumerate(operands):
            self.edge(operand, node.name, index)
        return _Value(node.name)

    def edge(self, operand: Any, vertex: str, index: int) -> None:
        value = self.values.get(operand) if isinstance(operand, Node) else None
        if value is not None and value.vertex is not None:
            self.flow.add_edge(value.vertex, vertex, index=index, via=value.via, value=self.stored(operand).name)

    def stored(self, node: Node) -> Node:
        """What a value is a view of."""
        while operation(self.gm, node) in _VIEWS and isinstance(before := (*node.args, None)[0], Node):
            node = before
        return node

    def _tell_cross_attention(self) -> None:
        data = _reached_from_inputs(self.flow)
        for vertex, attributes in self.flow.nodes(data=True):
            if attributes["op"] != "attention":
                continue
            sides = {d["index"]: u for u, _, d in self.flow.in_edges(vertex, data=True)}
            if 0 in sides and 1 in sides and _source(self.flow, sides[0], data) != _source(self.flow, sides[1], data):
                attributes["op"] = "cross_attention"

    def _drop_scores(self) -> None:
        """Scores that an attention has taken over lead nowhere now."""
        while dead := [v for v in self.scores if v in self.flow and self.flow.out_degree(v) == 0]:
            self.flow.remove_nodes_from(dead)


def _reached_from_inputs(flow: Flow) -> set[str]:
    """Vertices whose values depend on an input; position embeddings don't."""
    reached: set[str] = set()
    for vertex, attributes in flow.nodes(data=True):  # in the graph's order, so operands come first
        if attributes["op"] == "input" or any(p in reached for p in flow.predecessors(vertex)):
            reached.add(vertex)
    return reached


def _source(flow: Flow, vertex: str, data: set[str]) -> str:
    """The hidden states that a projection reads: projections and added positions are walked through."""
    seen = set()
    while vertex not in seen:
        seen.add(vertex)
        before = list(dict.fromkeys(p for p in flow.predecessors(vertex) if p in data))
        op = flow.nodes[vertex]["op"]
        if len(before) != 1 or op not in (*_PROJECTIONS, "sum") or op == "embedding":
            return vertex
        vertex = before[0]
    return vertex


def _find(root: nn.Module, path: str) -> Any:
    try:
        return attribute(root, path)
    except AttributeError:
        return None
