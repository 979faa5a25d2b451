"""Group: a graph with slots in; out, slots that read one input share one product with a stack of their A's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxpeft.passes.backend.backend_pass import ACTIVE, BackendPass, Context, SlotTensor
from fxpeft.passes.backend.writes import may_write
from fxpeft.passes.base import Report, RewriteResult, Skip, node_of, tensor_of
from fxpeft.passes.meta import GROUPED
from fxpeft.passes.rewrite.subgraphs import calls


@dataclass(frozen=True)
class Group:
    """A stack ``[max_rank, sites, in]`` of the A's of sites with one input.

    Args:
        place: the placeholder that takes it. Its own A is read by the group only.
        members: the placeholders whose A's it holds, in order; ``place`` is one of them.
    """

    place: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class _Product:
    """``linear(cast, view)``: ``source`` in A's dtype, times the leading ``rank`` rows of the A at ``place``."""

    node: Node
    place: Node
    cast: Node
    source: Node
    rank: Any


class GroupPass(BackendPass):
    """Sites with one input reduce it in one product: ``linear(x, stack[:r].flatten(0, 1))``, then a slice for each.

    A stack holds the ranks first and a rank's rows of all its sites side by side: narrowed to the rank in
    use it is contiguous, so that no rank adds a guard. Whoever calls the graph hands it in, see :func:`groups_of`.
    What no longer has a reader is left for :class:`~fxpeft.passes.CleanPass`.
    """

    name = uuid = "group"
    graphs = (ACTIVE,)

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        graph, factors = graph_module.graph, {k: held for k, held in context.slots.items() if held.part == "a"}
        places = [n for n in graph.nodes if n.op == "placeholder" and n.name in factors and not GROUPED.has(n)]
        products = {place: _products(place) for place in places}
        reasons = {p: _why_alone(factors[p.name]) or _why_not(graph_module, p, products[p]) for p in places}
        sets: dict[tuple[Any, ...], list[_Product]] = {}
        for product in (p for place in places if reasons[place] is None for p in products[place]):
            value = tensor_of(product.place)
            assert value is not None
            key = (product.source, product.rank, value.shape, value.dtype, value.device)
            sets.setdefault(key, []).append(product)
        order = {node: number for number, node in enumerate(graph.nodes)}
        stacks: dict[tuple[Node, ...], list[list[_Product]]] = {}
        for found in sets.values():
            found.sort(key=lambda p: order[p.node])
            members = tuple(dict.fromkeys(p.place for p in found))
            reason = None if len(members) > 1 else "shares its input with no other site"
            first = min((p.cast for p in found), key=order.__getitem__)
            if reason is None and (between := _write(first, found[-1].node)) is not None:
                reason = f"{between.name} may change their input between the sites that share it"
            if reason is None:
                stacks.setdefault(members, []).append(found)
            else:
                reasons.update({m: reason for m in members if reasons[m] is None})
        grouped = set[Node]()
        for members, several in stacks.items():
            own = {p.node for found in several for p in found}
            free = [m for m in members if {p.node for p in products[m]} <= own and _reads_only(m, products[m])]
            if not free:
                reasons.update(dict.fromkeys(members, "every A of the group is read elsewhere too"))
                continue
            _stack(free[0], members)
            for found in several:
                _rewrite(graph_module, free[0], members, found)
            grouped.update(members)
        alone = {p: reason for p, reason in reasons.items() if reason is not None and p not in grouped}
        skipped = tuple(Skip(factors[p.name].site, reason) for p, reason in alone.items())
        matched = tuple(factors[p.name].site for p in places if p in grouped)
        return RewriteResult(graph_module, bool(matched), Report(self.name, matched, skipped))


def groups_of(graph_module: GraphModule) -> tuple[Group, ...]:
    """The stacks that a graph takes."""
    placeholders = (n for n in graph_module.graph.nodes if n.op == "placeholder" and GROUPED.has(n))
    return tuple(Group(n.name, GROUPED.of(n)) for n in placeholders)


def _why_alone(factor: SlotTensor) -> str | None:
    """Why a slot's A can't be a part of a stack, whatever the graph does with it."""
    if "g_in" in factor.features:
        return "multiplies its input by a gain of its own"
    if "rotation" in factor.features:
        return "rotates its input"
    if factor.tensor.requires_grad:
        return "its A is trained"
    if factor.tensor.is_inference():
        return "its slot was made in inference mode, where torch counts no writes"
    if type(factor.tensor) is not Tensor:
        return f"its A is a {type(factor.tensor).__name__}"
    return None


def _views(place: Node) -> dict[Node, Any]:
    """The nodes that are a slot's active A, each with the rank that it was narrowed to; ``None``: all of it."""
    views: dict[Node, Any] = {place: None}
    for user in place.users:
        if user.op == "call_method" and user.target == "narrow" and user.args[:3] == (place, 0, 0):
            views[user] = user.args[3]
    return views


def _products(place: Node) -> list[_Product]:
    found = []
    for view, rank in _views(place).items():
        for node in view.users:
            plain = node.op == "call_function" and node.target is F.linear and len(node.args) == 2 and not node.kwargs
            cast = node_of(node.args[0]) if plain and node.args[1] is view else None
            if cast is not None:
                is_cast = cast.op == "call_method" and cast.target == "type_as"
                source = node_of(cast.args[0]) if is_cast else cast
                assert source is not None
                found.append(_Product(node, place, cast, source, rank))
    return found


def _why_not(gm: GraphModule, place: Node, products: list[_Product]) -> str | None:
    value = tensor_of(place)
    if any(place in call.node.all_input_nodes for call in calls(gm)):
        return "is read in the body of a higher-order operator"
    if not products:
        return "is no linear site with more rows than one"
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return "the shape of its A is not known while compiling"
    return None


def _reads_only(place: Node, products: list[_Product]) -> bool:
    """Whether a slot's A goes into these products, and elsewhere for its dtype only."""
    nodes = {p.node for p in products}
    views = _views(place)
    return all(
        user in nodes or user in views or (user.target == "type_as" and user.args[0] is not view)
        for view in views
        for user in view.users
    )


def _write(first: Node, last: Node) -> Node | None:
    """A node between two that may write to a tensor or change how the next ones compute, or ``None``."""
    node = first.next
    while node is not last:
        if may_write(node):
            return node
        node = node.next
    return None


def _rewrite(gm: GraphModule, place: Node, members: tuple[Node, ...], found: list[_Product]) -> None:
    graph, first, count = gm.graph, found[0], len(members)
    value = tensor_of(place)
    assert value is not None
    with graph.inserting_before(first.node):
        rank = value.shape[0] if first.rank is None else first.rank
        active = place if first.rank is None else graph.call_method("narrow", (place, 0, 0, rank))
        rows = graph.call_method("flatten", (active, 0, 1))
        reduced = graph.call_function(F.linear, (first.cast, rows))
        parts = graph.call_method("unflatten", (reduced, -1, (rank, count)))
    for product in found:
        with graph.inserting_before(product.node):
            part = graph.call_method("select", (parts, -1, members.index(product.place)))
        part.meta |= {k: v for k, v in product.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        product.node.replace_all_uses_with(part)
        graph.erase_node(product.node)


def _stack(place: Node, members: tuple[Node, ...]) -> None:
    """Say what the placeholder takes from now on."""
    value = tensor_of(place)
    assert value is not None
    shape = (value.shape[0], len(members), *value.shape[1:])
    # what Dynamo found there, and guards, is the slot's own A
    place.meta = {k: v for k, v in place.meta.items() if k != "grapharg"}
    place.meta["example_value"] = value.new_empty(shape)
    GROUPED.set(place, tuple(m.name for m in members))
