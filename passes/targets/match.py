"""Match: any graph in; the same graph out, its target nodes annotated with site and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, Report, RewriteResult, Skip, node_of
from fxpeft.passes.meta import ROLE, SITE, TARGET
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.operations.registry import module_operation, operation_of
from fxpeft.passes.targets.patterns import layers_of
from fxpeft.passes.targets.reading import Unsupported, argument, owner, view_of, weight_of
from fxpeft.passes.targets.regex import limited
from fxpeft.passes.targets.terms import Pattern, Subject


@dataclass(frozen=True)
class Target:
    """A node that a rewrite can take.

    Args:
        site: dotted name of the module that owns the weight; ``""`` is the root itself.
        kind: its linear algebra.
        input: index of the node's argument that carries the activations.
    """

    site: str
    kind: Kind
    input: int = 0


def module_kind(module: nn.Module) -> Kind | None:
    """The kind of a module that is called as one node, or ``None``."""
    found = module_operation(module)
    return None if found is None else found[1]


def read_target(graph_module: GraphModule, node: Node) -> Target | None:
    """Read one node: its target, ``None`` for any other operation.

    Raises:
        Unsupported: an operation of a known kind in a form that can't be rewritten.
    """
    if node.op == "call_module":
        of_module = module_kind(graph_module.get_submodule(str(node.target)))
        target = None if of_module is None else Target(str(node.target), of_module)
    elif node.op == "call_function" and (operation := operation_of(node.target)) is not None:
        places = operation.places(graph_module, node)
        if places is None:
            return None
        weight = weight_of(graph_module, argument(node, places.weight))
        if weight.picks is not None and not places.picks:
            raise Unsupported("its weight is computed in the graph, not read from a module")
        kind = operation.read(node, weight)
        site = weight.path if kind.is_parameter else owner(node, weight.path.rpartition(".")[0])
        target = Target(site, kind, places.input)
    else:
        return None
    if target is not None and len(node.args) <= target.input and (target.input or "input" not in node.kwargs):
        raise Unsupported("its input is passed under a name other than 'input'")
    return target


def operands(graph_module: GraphModule, node: Node) -> tuple[Node | str, bool, Node | str | None]:
    """Weight and bias of a target: nodes of the graph or, where a module is called, dotted names.

    The flag in the middle says that the weight is ``[in, out]`` and has to be transposed to be what
    :meth:`Kind.apply` takes.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        found = module_operation(module)
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        return f"{node.target}.weight", found is not None and found[0].flip, bias
    operation = operation_of(node.target)
    places = None if operation is None else operation.places(graph_module, node)
    assert places is not None
    weight = node_of(argument(node, places.weight))
    assert weight is not None
    return weight, places.flip, None if places.bias is None else node_of(argument(node, places.bias))


def bound_kind(node: Node, kind: Kind, wrap: Callable[[Node], Any]) -> Kind:
    """A target's kind with what else its algebra takes of the graph, each node wrapped."""
    operation = operation_of(node.target) if node.op == "call_function" else None
    return kind if operation is None else operation.bind(kind, node, wrap)


def _subject(graph_module: GraphModule, node: Node, target: Target, layer: tuple[int, int] | None) -> Subject:
    """What a pattern can ask about a node: classes from the recorded calls, else from the called module."""
    stack = node.meta.get("nn_module_stack") or {}
    classes = [cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__ for _, cls in stack.values()]
    if node.op == "call_module":
        own = type(graph_module.get_submodule(str(node.target))).__mro__
        classes += [cls.__name__ for cls in own if issubclass(cls, nn.Module)]
    role = ROLE.get(node)
    return Subject(target.site, target.kind, tuple(dict.fromkeys(classes)), (role,) if role else (), layer)


def stored_weight(graph_module: GraphModule, node: Node) -> tuple[Node | str, bool]:
    """Where a target's weight is read, as in :func:`operands`, and whether it is stored ``[in, out]``."""
    found, flip, _ = operands(graph_module, node)
    if isinstance(found, str):
        return found, flip
    view = view_of(found)
    assert view.node is not None
    return view.node, flip != (len(view.swaps) % 2 == 1)  # the graph may transpose it itself


class MatchPass(GraphPass):
    """Annotate the target nodes that ``select`` takes: ``TARGET.of(node)`` becomes a :class:`Target`.

    Args:
        select: a :class:`NameSelector`; a pattern (:mod:`fxpeft.passes.targets.patterns`), whose roles are those
            that :class:`fxpeft.passes.RolePass` found before; or any predicate on a site's dotted name.
    """

    name = "match"

    def __init__(self, select: NameSelector | Pattern | Callable[[str], bool]) -> None:
        self.select = select

    @limited()
    def call(self, graph_module: GraphModule) -> RewriteResult:
        matched, skipped, modified = [], [], False
        found: list[tuple[Node, Target]] = []
        for node in graph_module.graph.nodes:
            if SITE.has(node):
                continue  # an adapter's own node
            try:
                target = read_target(graph_module, node)
            except Unsupported as why:
                skipped.append(Skip(node.name, str(why)))
                continue
            if target is not None:
                found.append((node, target))
        layers = layers_of([target.site for _, target in found])
        for node, target in found:
            if isinstance(self.select, NameSelector):
                reason = self.select.why_not(target.site)
            elif isinstance(self.select, Pattern):
                reason = self.select.why_not(_subject(graph_module, node, target, layers.get(target.site)))
            else:
                reason = None if self.select(target.site) else "not selected"
            if reason:
                skipped.append(Skip(target.site, reason))
                continue
            matched.append(target.site)
            modified |= TARGET.get(node) != target
            TARGET.set(node, target)
        size = len(graph_module.graph.nodes)
        report = Report(self.name, tuple(matched), tuple(skipped), size, size)
        return RewriteResult(graph_module, modified, report)
