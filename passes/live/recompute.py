"""Recompute: a graph with rewritten sites in; out, autograd keeps nothing wide of them but their inputs.

Autograd keeps the operands of products. Of a site's training subgraph those are *wide*, ``[tokens, features]``: a copy
of the input in the adapter's dtype, another after dropout with its mask, an update that is scaled by what is trained;
or *narrow*, ``[tokens, rank]``. The rule:

- the site's input is kept as it is, in its own dtype: sites that read one tensor keep it once;
- what is narrow, and what is computed from parameters alone, is kept;
- what a product with the base's weight gives is kept where a gradient needs it, since it is dear to make again;
- everything else that is wide is computed again in the backward pass: casts, dropout with the same mask, and the
  products that widen the rank. These calls move into a function of their own, which
  :func:`~fxpeft.passes.live.recomputed.recompute` calls.

Where all of a site's gradients can be written down (:mod:`fxpeft.passes.live.derive`), the site is one call of
:func:`~fxpeft.passes.live.derived.derived`, which computes them by the same rule, or calls the form above.

A subgraph with a call that isn't known to be the same when it is made again stays as it is, and the report says so.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxpeft.passes.base import GraphPass, Report, RewriteResult, Skip, attribute
from fxpeft.passes.live.derive import Derivative, Site, derivative
from fxpeft.passes.live.derived import derived
from fxpeft.passes.live.recomputed import drop, recompute
from fxpeft.passes.meta import OPERAND, ORIGIN, REWRITE, SITE, TARGET
from fxpeft.passes.rewrite.inject import rename
from fxpeft.passes.source import Local
from fxpeft.passes.targets import convolution

# what gives the same when it is called again: products, whose operands autograd keeps, ...
_PRODUCTS: Collection[Any] = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, convolution.mix, F.embedding}
# ... calls of which it keeps each operand for the other's gradient, and those of which it keeps none
_TIMES: Collection[Any] = {operator.mul, operator.truediv, torch.mul, torch.div}
_PLUS: Collection[Any] = {operator.add, operator.sub, operator.neg, torch.add, torch.sub}
_VIEWS = {"type_as", "to", "float", "view", "reshape", "flatten", "unsqueeze", "squeeze", "transpose", "t"}

STILL, NARROW, WIDE, DEAR = range(4)


class RecomputePass(GraphPass):
    """See the module; a graph of :class:`~fxpeft.passes.InjectPass` whose operands are in place."""

    name = "recompute"

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph = graph_module.graph
        before, count = len(graph.nodes), 0
        matched, skipped = [], list[Skip]()
        for base in [node for node in graph.nodes if ORIGIN.has(node)]:
            site = TARGET.of(base).site
            try:
                width, regions = _regions(graph_module, base)
            except _Unknown as unknown:
                skipped.append(Skip(site, str(unknown)))
                continue
            whole, casts = _site(graph_module, base, width), all(map(_casts, regions))
            written = derivative(whole) if whole is not None and regions else None
            for region in regions:
                _move(graph, region, width, f"_recomputed{count}")
                count += 1
            if whole is not None and written is not None:
                _write(graph, base, whole, width, written, casts)
            if regions:
                matched.append(site)
        if count:
            _sort(graph)
        report = Report(self.name, tuple(matched), tuple(skipped), before, len(graph.nodes))
        return RewriteResult(graph_module, bool(count), report)


class _Unknown(Exception):
    """A subgraph that is left as it is, and why."""


def _regions(gm: GraphModule, base: Node) -> tuple[dict[Node, int], list[list[Node]]]:
    """How wide a site's values are, and the calls that are made again together, in the graph's order.

    Raises:
        _Unknown: a call that depends on the site's input may not be, or would have to be before its inputs are there.
    """
    made = [n for n in gm.graph.nodes if REWRITE.has(n) and SITE.get(n) == base.name]
    width = _widths(gm, made, base)
    trained = _trained(gm, made)
    whole: dict[Node, set[Node]] = {}  # node -> the region that it is in
    for node in made:
        if width[node] == STILL:
            continue
        kept = [v for v in _kept(gm, node, width, trained) if width.get(v) == WIDE and (v in made or v is node)]
        if kept:
            region = {node}.union(*(_origin(v, width, made) for v in kept))
            region = region.union(*(whole[n] for n in region if n in whole))
            whole |= dict.fromkeys(region, region)
    distinct = {id(region): region for region in whole.values()}.values()
    found = [[n for n in made if n in region] for region in distinct]
    for each in found:
        _check_apart(each)
    return width, found


def _site(gm: GraphModule, base: Node, width: dict[Node, int]) -> Site | None:
    """The whole of a site, or ``None`` where something between its calls isn't the site's."""
    made = [n for n in gm.graph.nodes if width.get(n, STILL) != STILL and n is not base]
    try:
        _check_apart(made)
    except _Unknown:
        return None
    read = dict.fromkeys(a for node in made for a in node.all_input_nodes if a not in made)
    still = [a for a in read if _width(a, width) == STILL]
    trained = _trained(gm, [n for n in gm.graph.nodes if REWRITE.has(n) and SITE.get(n) == base.name])
    return Site(
        made,
        {n for n in made if width[n] == WIDE},
        [a for a in read if a not in still],
        [a for a in still if a in trained],
        [a for a in still if a not in trained],
        _modules(made),
    )


def _write(graph: Graph, base: Node, site: Site, width: dict[Node, int], written: Derivative, casts: bool) -> None:
    """Put a site's calls, some of which have moved, into functions of their own, and one call in their place."""
    _sort(graph)
    mine = [n for n in graph.nodes if REWRITE.has(n) and SITE.get(n) == base.name and n.op != "get_attr"]
    made = [n for n in mine if width.get(n, WIDE) != STILL]
    (result,) = (n for n in made if any(user not in made for user in n.users))
    modules = [n for n in dict.fromkeys(a for node in made for a in node.all_input_nodes) if _is_read(n, site.dropouts)]
    body, values = Graph(), dict[Node, Node]()
    for argument in (*site.arguments, *modules):
        values[argument] = body.placeholder(argument.name)
    for node in made:
        values[node] = body.node_copy(node, values.__getitem__)
    body.output(values[result])
    given = {"site": body, "kept": written.kept, "again": written.again, "backward": written.backward}
    number = sum(n.target is derived for n in graph.nodes)
    forms: list[Any] = [Local(f"_{name}{number}", each) for name, each in given.items()]
    groups = [tuple(nodes) for nodes in (site.inputs, site.trained, site.others, modules)]
    with graph.inserting_after(made[-1]):
        call = graph.call_function(derived, (*forms, written.saved, casts, *groups))
    call.meta.update(result.meta)
    result.replace_all_uses_with(call, delete_user_cb=lambda user: user not in made)
    rename(graph, {result.name: call.name})
    for node in reversed(made):
        graph.erase_node(node)


def _is_read(node: Node, paths: list[str]) -> bool:
    return node.op == "get_attr" and str(node.target) in paths


def _widths(gm: GraphModule, made: list[Node], base: Node) -> dict[Node, int]:
    """How wide each of a site's values is, and whether it may be made again."""
    width: dict[Node, int] = {base: DEAR}
    for node in made:
        widest = max((_width(a, width) for a in _given(node)), default=STILL)
        if widest == STILL:
            width[node] = STILL
        elif node.target in _PRODUCTS:
            value, weight = _operands(node)
            if _width(weight, width) != STILL:
                raise _Unknown(f"multiplies two values that depend on its input ({node.name})")
            if not _brought(weight):
                width[node] = DEAR
            else:
                width[node] = {NARROW: WIDE, WIDE: NARROW}.get(_width(value, width), DEAR)
        elif _is_known(gm, node):
            width[node] = widest
        else:
            raise _Unknown(f"calls {node.target}, which may give something else when it is called again")
    return width


def _width(node: Node, width: dict[Node, int]) -> int:
    """Of a value of the site, or of what it reads: the module's own tensors are still, its inputs are wide."""
    return width.get(node, STILL if node.op == "get_attr" else WIDE)


def _given(node: Node) -> list[Node]:
    """The values that a call computes with: what it casts like is none."""
    return node.all_input_nodes[: 1 if node.target == "type_as" else None]


def _is_known(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_function":
        return node.target in _TIMES or node.target in _PLUS
    return node.target in _VIEWS if node.op == "call_method" else _is_dropout(gm, node)


def _is_dropout(gm: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and type(attribute(gm, str(node.target))) is nn.Dropout


def _operands(node: Node) -> tuple[Node, Node]:
    """A product's value and its weight."""
    value, weight = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node))
    return value, weight


def _brought(weight: Node) -> bool:
    """Whether a weight follows from what an adapter brought, and from nothing of the base's."""
    if weight.op == "get_attr":
        return OPERAND.has(weight)
    return all(_brought(a) for a in weight.all_input_nodes)


def _trained(gm: GraphModule, made: list[Node]) -> set[Node]:
    """The values that depend on a parameter that an adapter brought and may train."""
    found: set[Node] = set()
    for node in made:
        if node.op == "get_attr":
            if OPERAND.has(node) and isinstance(attribute(gm, str(node.target)), nn.Parameter):
                found.add(node)
        elif node.target != "detach" and not found.isdisjoint(_given(node)):
            found.add(node)
    return found


def _kept(gm: GraphModule, node: Node, width: dict[Node, int], trained: set[Node]) -> Iterator[Node]:
    """The values that autograd keeps of a call; the call itself stands for a mask of its size."""
    if _is_dropout(gm, node):
        yield node
    elif node.target in _PRODUCTS and node.target is not F.embedding:
        value, weight = _operands(node)
        if weight in trained:
            yield value
    elif node.target in _TIMES:
        for one, other in (node.args, node.args[::-1]):
            if not isinstance(one, Node) or not isinstance(other, Node):
                continue
            if other in trained or _width(other, width) != STILL:
                yield one


def _origin(value: Node, width: dict[Node, int], made: Collection[Node]) -> set[Node]:
    """A wide value's calls, back to what is kept."""
    if value not in made or width[value] != WIDE:
        return set()
    return {value}.union(*(_origin(a, width, made) for a in value.all_input_nodes))


def _check_apart(region: list[Node]) -> None:
    """Refuse a region that needs a value which follows from it.

    Raises:
        _Unknown: it does.
    """
    after = {user for node in region for user in node.users if user not in region}
    waiting = list(after)
    while waiting:
        for user in waiting.pop().users:
            if user in region:
                raise _Unknown(f"what {user.name} reads follows from values that would be made again with it")
            if user not in after:
                after.add(user)
                waiting.append(user)


def _move(graph: Graph, region: list[Node], width: dict[Node, int], name: str) -> None:
    """Put a region's calls into a function of their own, and one call of it in their place."""
    results = [n for n in region if any(user not in region for user in n.users)]
    read = dict.fromkeys(a for node in region for a in node.all_input_nodes if a not in region)
    inputs = tuple(a for a in read if _width(a, width) != STILL)
    operands = [a for a in read if _width(a, width) == STILL]
    body, values = Graph(), dict[Node, Node]()
    with graph.inserting_after(region[-1]):
        modules = {path: graph.create_node("get_attr", path) for path in _modules(region)}
        for given in (*inputs, *operands, *modules.values()):
            values[given] = body.placeholder(given.name)
        for node in region:
            if node.op == "call_module":
                value, called = node.all_input_nodes[0], values[modules[str(node.target)]]
                if _is_cast_for(node, value, region):
                    values[node] = body.call_function(drop, (*(values[a] for a in value.all_input_nodes), called))
                    body.erase_node(values[value])
                else:
                    values[node] = body.call_method("__call__", (called, values[value]))
            else:
                values[node] = body.node_copy(node, values.__getitem__)
        body.output(values[results[0]] if len(results) == 1 else tuple(values[n] for n in results))
        arguments: tuple[Any, ...] = (Local(name, body), inputs, (*operands, *modules.values()))
        if _casts(region):
            ahead = tuple((inputs.index(a), operands.index(b)) for a, b in _cast_first(region, inputs).items())
            arguments = (*arguments, True, ahead)
        call = graph.call_function(recompute, arguments)
    made = [call]
    if len(results) > 1:
        with graph.inserting_after(call):
            made = [graph.call_function(operator.getitem, (call, place)) for place in range(len(results))]
    for old, new in zip(results, made, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in region)
    for new in dict.fromkeys((call, *made, *modules.values())):
        new.meta.update(results[0].meta)
    for node in modules.values():
        OPERAND.set(node, True)
    for node in reversed(region):
        graph.erase_node(node)


def _cast_first(region: list[Node], inputs: Collection[Node]) -> dict[Node, Node]:
    """The inputs with which a region does nothing but cast them, each to the dtype of one operand: input -> operand."""
    found = {}
    for given in inputs:
        users = [n for n in region if given in n.all_input_nodes]
        likes = {n.all_input_nodes[-1] for n in users if n.target == "type_as" and n.args[0] is given}
        if len(likes) == 1 and all(n.target == "type_as" for n in users) and likes.isdisjoint((*region, *inputs)):
            found[given] = likes.pop()
    return found


def _is_cast_for(dropout: Node, value: Node, region: Collection[Node]) -> bool:
    """Whether a dropout alone reads a value that was cast for it."""
    return value in region and value.target == "type_as" and list(value.users) == [dropout]


def _casts(region: list[Node]) -> bool:
    """Whether autograd keeps nothing else of a region than what it casts."""
    return all(node.target in ("type_as", *_PRODUCTS) for node in region)


def _modules(region: list[Node]) -> list[str]:
    """The paths of the modules that are called in a region."""
    return list(dict.fromkeys(str(n.target) for n in region if n.op == "call_module"))


def _sort(graph: Graph) -> None:
    """Put each node behind what it reads; nodes that may stay in order do."""
    placed: set[Node] = set()
    last = None
    waiting = list(graph.nodes)
    while waiting:
        node = next(n for n in waiting if placed.issuperset(n.all_input_nodes))
        waiting.remove(node)
        if last is not None:
            last.append(node)
        placed.add(node)
        last = node
