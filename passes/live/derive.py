"""A site's gradients written out: its training subgraph in; out, graphs of what it keeps and of its backward pass.

Autograd notes a graph call by call, and where values are made again it notes, and computes, more than a gradient needs.
A subgraph of products, sums, factors, casts and dropout has gradients that are as plain as itself, so they are written
down, by the rule of :mod:`fxpeft.passes.live.recompute`: what is narrow and what is dear is kept, what is wide is made
again, and no product is made that no gradient needs. Memory is written over where nobody else reads it: on a CPU a
buffer of the tokens' size costs as much as a product of the rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fxpeft.passes.live import derived as calls
from fxpeft.passes.live.recomputed import cast_like

ADD: Collection[Any] = {operator.add, torch.add}
SUBTRACT: Collection[Any] = {operator.sub, torch.sub}
MULTIPLY: Collection[Any] = {operator.mul, torch.mul}
PRODUCTS: Mapping[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    F.linear: (calls.linear_value, calls.linear_weight),
    torch.matmul: (calls.matmul_value, calls.matmul_weight),
}


@dataclass(frozen=True)
class Site:
    """The calls of a site that depend on its inputs.

    Args:
        made: in the graph's order; they include no read of an attribute. made_again: those of them that are made again
            in the backward pass. inputs: what they read beside each other. trained, others: what they read that
            depends on no input, and whether it depends on what is trained. dropouts: paths of the modules that they
            call.
    """

    made: list[Node]
    made_again: Collection[Node]
    inputs: list[Node]
    trained: list[Node]
    others: list[Node]
    dropouts: list[str]

    @property
    def arguments(self) -> list[Node]:
        """All that they read."""
        return [*self.inputs, *self.trained, *self.others]


@dataclass(frozen=True)
class Derivative:
    """The graphs; see :class:`fxpeft.passes.live.derived.Forms`."""

    kept: Graph
    again: Graph
    backward: Graph
    saved: tuple[int, ...]


def derivative(site: Site) -> Derivative | None:
    """The graphs of a site, or ``None`` where a call's gradient isn't written down here."""
    results = [n for n in site.made if any(user not in site.made for user in n.users)]
    if len(results) != 1 or not site.trained or not all(_is_known(node, site) for node in site.made):
        return None
    backward = _Backward(site, results[0])
    again = _Values(site, backward.likes, keeps=False)
    values = tuple(again.value(node) for node in backward.kept)
    if not set(again.saved) <= set(backward.saved):  # they would have to be kept for a gradient of the gradient alone
        return None
    return Derivative(
        _kept(site, results[0], backward),
        again.finish(values, (), backward.saved),
        backward.graph,
        tuple(site.arguments.index(a) for a in backward.saved),
    )


def _nodes(node: Node) -> list[Node]:
    """A call's arguments, which are values."""
    return [a for a in node.args if isinstance(a, Node)]


def _is_known(node: Node, site: Site) -> bool:
    """Whether a call's gradient is written down here; a product's weight follows from no input."""
    if node.kwargs or node.op == "call_module":
        return not node.kwargs and len(node.args) == 1
    if node.target in PRODUCTS:
        return len(node.args) == 2 and node.args[1] in (*site.trained, *site.others)
    known = node.target == "type_as" or node.target in (*ADD, *SUBTRACT, *MULTIPLY)
    return known and len(node.args) == 2


def _kept(site: Site, result: Node, backward: _Backward) -> Graph:
    """The graph of the result, of what is kept, of what the backward pass is told, and of how masks were drawn."""
    graph, values, told = Graph(), dict[Node, Node](), dict[Node, Node]()

    def call(function: Callable[..., Any], *args: Any) -> Node:
        return graph.call_function(function, args)

    def both(pair: Node) -> tuple[Node, Node]:
        return call(operator.getitem, pair, 0), call(operator.getitem, pair, 1)

    for argument in site.arguments:
        values[argument] = graph.placeholder(argument.name)
    modules = {path: graph.placeholder(path.rpartition(".")[2]) for path in site.dropouts}
    sums = dict(_sums(site, backward))
    drawn, merged = [], {product for _, product in sums.values()}
    for node in (*site.arguments, *site.made):
        if node.op == "call_module" and node in site.made:
            value = node.all_input_nodes[0]
            mask, how = both(call(calls.drawn, values[value], modules[str(node.target)]))
            cast = _cast(value) if value in site.made and value not in backward.kept else None
            values[node] = call(calls.dropped, values[value], mask, *(() if cast is None else (values[cast],)))
            drawn.append(how)
        elif node in sums:
            total, product = sums[node]
            last = _is_fresh(total, site, backward)
            pair = call(calls.add_product, values[total], *(values[a] for a in product.all_input_nodes), last)
            values[node], told[product] = both(pair)
        elif node.target == "type_as" and node in site.made:
            values[node] = call(cast_like, *map(values.__getitem__, _nodes(node)))
        elif node in site.made and node not in merged:
            values[node] = graph.node_copy(node, values.__getitem__)
        if node in backward.likes and node not in merged:  # now, so that it need not be held for that
            told[node] = call(calls.like, values[node])
    likes = tuple(told[node] for node in backward.likes)
    graph.output((values[result], tuple(values[node] for node in backward.kept), likes, tuple(drawn)))
    return graph


def _cast(value: Node) -> Node | None:
    """What a value is a cast of that one call reads, or ``None``."""
    return value.all_input_nodes[0] if value.target == "type_as" and len(value.users) == 1 else None


def _sums(site: Site, backward: _Backward) -> Iterator[tuple[Node, tuple[Node, Node]]]:
    """Sums with a product that nothing else reads: the sum, what is added to, the product."""
    for node in site.made:
        if node.target in ADD:
            values = [a for a in _nodes(node) if a in site.made or a in site.inputs]
            products = [a for a in values if a.target is F.linear and _is_alone(a, site, backward)]
            if len(set(values)) == 2 and products:
                product = products[-1]
                yield node, (values[values[0] is product], product)


def _is_alone(node: Node, site: Site, backward: _Backward) -> bool:
    """Whether a value is made here for one other, and is neither kept nor told of."""
    return node in site.made and len(node.users) == 1 and node not in backward.kept


def _is_fresh(node: Node, site: Site, backward: _Backward) -> bool:
    return node.target in (*ADD, *MULTIPLY, *SUBTRACT) and _is_alone(node, site, backward)


class _Values:
    """Values of a site in a graph of its own: arguments, what is kept, and what is made again from these.

    Args:
        likes: the values whose dtype and shape the graph is told; those that it asks for are added.
        keeps: whether it is given the values that are kept.
    """

    def __init__(self, site: Site, likes: list[Node], *, keeps: bool) -> None:
        self.site, self.likes, self.keeps = site, likes, keeps
        self.graph = Graph()
        self.told, self.noises = self.graph.placeholder("likes"), self.graph.placeholder("noises")
        self.saved: list[Node] = []
        self.kept: list[Node] = []
        self.values: dict[Node, Node] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        return self.graph.call_function(function, args)

    def like(self, node: Node) -> Node:
        """The dtype and shape of a value."""
        if node not in self.likes:
            self.likes.append(node)
        return self.call(operator.getitem, self.told, self.likes.index(node))

    def noise(self, node: Node) -> Node:
        """The mask of a dropout."""
        called = [n for n in self.site.made if n.op == "call_module"]
        return self.call(operator.getitem, self.noises, called.index(node))

    def value(self, node: Node) -> Node:
        """A value."""
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def _value(self, node: Node) -> Node:
        if node not in self.site.made or (self.keeps and node not in self.site.made_again):
            (self.kept if node in self.site.made else self.saved).append(node)
            return self.graph.placeholder(node.name)
        if node.op == "call_module":
            value = node.all_input_nodes[0]
            source = _cast(value) if value in self.site.made_again else None
            given = () if source is None else (self.value(source),)
            return self.call(calls.dropped, self.value(value), self.noise(node), *given)
        if node.target == "type_as":
            return self.call(calls.cast, self.value(node.all_input_nodes[0]), self.like(node))
        for read in node.all_input_nodes:
            self.value(read)
        return self.graph.node_copy(node, self.values.__getitem__)

    def finish(self, result: Any, first: Collection[Node], saved: Collection[Node]) -> Graph:
        """The graph, its arguments in order: ``first``, what it is told, what is saved, what is kept."""
        for node in saved:
            if node not in self.values:
                self.values[node] = self.graph.placeholder(node.name)
        held = [self.values[n] for n in (*saved, *self.kept)]
        for node in reversed([*first, self.told, self.noises, *held]):
            next(iter(self.graph.nodes)).prepend(node)
        self.graph.output(result)
        return self.graph


class _Backward(_Values):
    """The gradients of a site's inputs and of what is trained, from that of its result."""

    def __init__(self, site: Site, result: Node) -> None:
        super().__init__(site, [], keeps=True)
        self.up, self.needs = self.graph.placeholder("up"), self.graph.placeholder("needs")
        self.grads: dict[Node, Node] = {result: self.up}
        self.products: set[Node] = set()  # gradients that are in memory of their own
        self.before: dict[Node, Node] = {}  # of a gradient that was cast: that from which it was
        self.follows = _follows(site)
        for node in reversed(site.made):
            if node in self.grads:
                self.send(node, self.grads[node])
        wanted = tuple(self.grads.get(argument) for argument in (*site.inputs, *site.trained))
        self.finish(wanted, (self.up, self.needs), self.saved)

    def send(self, node: Node, up: Node) -> None:
        """Add the gradients of what a call reads to theirs."""
        if node.op == "call_module":
            over = (None,) if up in self.products else ()
            self.add(node.all_input_nodes[0], lambda: self.call(calls.dropped, up, self.noise(node), *over))
        elif node.target == "type_as":
            value = node.all_input_nodes[0]
            if value not in self.grads:
                self.before[value] = up
            self.add(value, lambda: self.call(calls.narrowed, up, self.like(value), *self.cast_from(node)))
            if up in self.products and value in self.grads:
                self.products.add(self.grads[value])
        elif node.target in PRODUCTS:
            of_value, of_weight = PRODUCTS[node.target]
            value, weight = _nodes(node)
            # first that for which something wide is made again, so that it is gone before the next is made
            self.add(weight, lambda: self.call(of_weight, up, self.value(value), self.value(weight)))
            self.add(value, lambda: self.call(of_value, up, self.value(weight), self.like(value), *self.needed(value)))
            if value in self.grads:
                self.products.add(self.grads[value])
        elif node.target in MULTIPLY:
            for one, other in (node.args, node.args[::-1]):
                self.factor(one, other, up)
        else:
            one, other = node.args
            self.summand(one, node, up)
            self.summand(other, node, up, minus=node.target in SUBTRACT)

    def factor(self, of: Any, other: Any, up: Node) -> None:
        """Add the gradient of one factor."""
        if self.depends(of):
            factor = self.value(other) if isinstance(other, Node) else other
            self.add(of, lambda: self.call(calls.times, up, factor, self.like(of), *self.needed(of)))

    def summand(self, of: Any, node: Node, up: Node, *, minus: bool = False) -> None:
        """Add the gradient of one summand."""
        if minus:
            self.add(of, lambda: self.call(calls.narrowed, self.call(calls.minus, up), self.like(of)))
        else:
            self.add(of, lambda: self.call(calls.narrowed, up, self.like(of), *self.cast_from(node)))

    def add(self, to: Any, make: Callable[[], Node]) -> None:
        """Add a gradient to that of a value, where it has one."""
        if not self.depends(to):
            return
        if to in self.grads:
            self.grads[to] = self.call(calls.plus, self.grads[to], make())
            self.before.pop(to, None)
        else:
            self.grads[to] = make()

    def depends(self, node: Any) -> bool:
        """Whether a value may have a gradient."""
        return isinstance(node, Node) and bool(self.follows[node])

    def cast_from(self, node: Node) -> tuple[Node, ...]:
        """From what a value's gradient was cast, if it was."""
        return (self.before[node],) if node in self.before else ()

    def needed(self, node: Node) -> tuple[Node, ...]:
        """Whether something needs the gradient of a value; nothing is always."""
        follows = self.follows[node]
        if not follows.isdisjoint(self.site.trained):
            return ()
        first, *more = (
            self.call(operator.getitem, self.needs, place)
            for place, given in enumerate(self.site.inputs)
            if given in follows
        )
        return (functools.reduce(lambda one, other: self.call(operator.or_, one, other), more, first),)


def _follows(site: Site) -> dict[Node, set[Node]]:
    """A value -> those of the inputs and of what is trained that it follows from."""
    found = {argument: {argument} for argument in (*site.inputs, *site.trained)}
    found |= {argument: set() for argument in site.others}
    for node in site.made:
        read = node.all_input_nodes[: 1 if node.target == "type_as" else None]
        found[node] = set[Node]().union(*(found[given] for given in read))
    return found
