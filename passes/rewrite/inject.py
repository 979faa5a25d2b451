"""Inject: a graph with annotated targets in; out, each becomes its adapter-augmented subgraph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip, attribute, join
from fxpeft.passes.container import Container
from fxpeft.passes.meta import OPERAND, ORIGIN, REWRITE, SITE, TARGET, Located, Origin
from fxpeft.passes.replaced import one_node_each
from fxpeft.passes.targets.match import bound_kind, operands

Takers: TypeAlias = "defaultdict[str, list[Node]]"


@dataclass(frozen=True)
class Rewrite:
    """One subgraph for one site.

    Args:
        name: stands in reports and on every new node, as in ``lora:default``.
        function: ``function(kind, base, x, **operands) -> y``, plain tensor code. It is called once
            on proxies, and what it does becomes the subgraph. ``base(x)`` is the target itself; it
            has to be called exactly once.
        operands: path below the site's container -> tensor, module (passed as a callable) or any
            other object that the graph reads. ``function`` gets each by the last part of its path,
            the container itself, ``""``, by its name.
        container: the attribute that holds the operands: ``container.path`` on the root where the
            root is the site, ``container.site.path`` in a larger program, so that modules which
            the program shares with a live model are left alone.
        reads: what ``function`` gets of the target itself, by name: ``weight``, ``[out, in, ...]``
            however it is stored, and ``bias``, which may be ``None``.
        shared: those of the operands that other sites read too: in a larger program they lie once, at
            ``container.path``.
    """

    name: str
    function: Callable[..., Any]
    operands: Mapping[str, Any] = field(default_factory=dict)
    container: str = "adapters"
    reads: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def signature(self) -> tuple[Any, ...]:
        """What the rewritten graph depends on, the operands' values left out."""
        operands = tuple((path, isinstance(value, nn.Module)) for path, value in self.operands.items())
        return self.name, self.function, operands, self.container, self.reads, self.shared

    def path(self, site: str, operand: str) -> str:
        """Where an operand lies, seen from the graph's root."""
        return join(self.container, "" if operand in self.shared else site, operand)


class InjectPass(GraphPass):
    """Rewrite annotated targets (see :class:`~fxpeft.passes.MatchPass`).

    Args:
        rewrites: site -> its rewrites; each takes the one before as its base. A site without an
            entry is left alone and reported.
    """

    name = "inject"

    def __init__(self, rewrites: Mapping[str, Sequence[Rewrite]]) -> None:
        self.rewrites = rewrites

    def call(self, graph_module: GraphModule) -> RewriteResult:
        before = len(graph_module.graph.nodes)
        matched, skipped = [], []
        takers = takers_of(graph_module.graph)
        for node in list(graph_module.graph.nodes):
            target = TARGET.get(node)
            if target is None:
                continue
            if ORIGIN.has(node):
                skipped.append(Skip(target.site, "is rewritten already; eject it first"))
            elif not (rewrites := self.rewrites.get(target.site, ())):
                skipped.append(Skip(target.site, "has no rewrite"))
            else:
                _rewrite_site(graph_module, node, target, rewrites, takers)
                matched.append(target.site)
        report = Report(self.name, tuple(matched), tuple(skipped), before, len(graph_module.graph.nodes))
        return RewriteResult(graph_module, bool(matched), report)


def _rewrite_site(gm: GraphModule, node: Node, target: Located, rewrites: Sequence[Rewrite], takers: Takers) -> None:
    graph, tracer = gm.graph, GraphAppendingTracer(gm.graph)
    first, end = node.prev, node.next  # what is made stands between these, around the node
    source = node.args[target.input] if target.input < len(node.args) else node.kwargs["input"]
    assert isinstance(source, Node)
    calls = 0

    with ExitStack() as insertion:
        insertion.enter_context(graph.inserting_before(node))

        def base(x: Proxy) -> Proxy:
            nonlocal calls
            calls += 1
            if x.node is not source:
                node.replace_input_with(source, x.node)
            insertion.enter_context(graph.inserting_before(node.next))
            return Proxy(node, tracer)

        function: Callable[..., Proxy] = base
        for rewrite in rewrites:
            function = _bind(gm, node, rewrite, function, tracer)
        insertion.enter_context(one_node_each())
        result = function(Proxy(source, tracer))

    if calls != 1:
        raise PassError(f"site {target.site!r}: a rewrite has to call base exactly once, it did {calls} times")
    new = [n for n in _between(first, end) if n is not node]
    names = tuple(rewrite.name for rewrite in rewrites)
    for made in new:
        SITE.set(made, node.name)
        REWRITE.set(made, names)
    if result.node is not node:
        reroute(node, result.node, new, takers)
    ORIGIN.set(node, Origin(names, source.name, result.node.name))
    takers[source.name].append(node)


def _between(first: Node, end: Node) -> Iterator[Node]:
    """The nodes after one and before another."""
    node = first.next
    while node is not end:
        yield node
        node = node.next


def takers_of(graph: Graph) -> Takers:
    """The rewritten sites of a graph: name of the node that each took -> their base nodes."""
    found: Takers = defaultdict(list)
    for node in graph.nodes:
        if origin := ORIGIN.get(node):
            found[origin.input].append(node)
    return found


def reroute(old: Node, new: Node, keep: Collection[Node], takers: Takers) -> None:
    """Let all users of ``old`` but ``keep`` use ``new``; rewritten sites then remember it as their input."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)
    for node in takers.pop(old.name, ()):
        if origin := ORIGIN.get(node):  # it may have been ejected since
            ORIGIN.set(node, replace(origin, input=new.name))
            takers[new.name].append(node)


def rename(graph: Graph, names: Mapping[str, str]) -> None:
    """Let rewritten sites know by which names their inputs and outputs go now: old -> new."""
    for node in graph.nodes if names else ():
        if origin := ORIGIN.get(node):
            into, out = (names.get(name, name) for name in (origin.input, origin.output))
            ORIGIN.set(node, replace(origin, input=into, output=out))


def _bind(
    gm: GraphModule, node: Node, rewrite: Rewrite, base: Callable[..., Proxy], tracer: GraphAppendingTracer
) -> Callable[[Proxy], Proxy]:
    target = TARGET.of(node)

    def function(x: Proxy) -> Proxy:
        given = {
            path.rpartition(".")[2] or rewrite.container: _operand(gm, rewrite.path(target.site, path), value, tracer)
            for path, value in rewrite.operands.items()
        }
        given |= _own_operands(gm, node, rewrite.reads, tracer)
        kind = bound_kind(node, target.kind, lambda read: Proxy(read, tracer))
        result: Proxy = rewrite.function(kind, base, x, **given)
        return result

    return function


def _own_operands(gm: GraphModule, node: Node, reads: Sequence[str], tracer: GraphAppendingTracer) -> dict[str, Any]:
    if not reads:
        return {}
    weight, flip, bias = operands(gm, node)
    found: dict[str, Any] = {}
    for name, value in (("weight", weight), ("bias", bias)):
        if name in reads:
            read = get_attr(tracer.graph, value) if isinstance(value, str) else value
            found[name] = None if read is None else Proxy(read, tracer)
    if flip and "weight" in found:
        found["weight"] = found["weight"].t()
    return found


def _operand(gm: GraphModule, path: str, value: Any, tracer: GraphAppendingTracer) -> Any:
    install(gm, path, value)
    if isinstance(value, nn.Module) and not isinstance(value, Container):
        return lambda *args: Proxy(tracer.graph.call_module(path, tuple(a.node for a in args)), tracer)
    read = get_attr(tracer.graph, path)
    OPERAND.set(read, True)
    return Proxy(read, tracer)


def get_attr(graph: Graph, path: str) -> Node:
    """A read of ``path``. ``Graph.get_attr`` would warn about an object that is no tensor."""
    return graph.create_node("get_attr", path)


def install(root: nn.Module, path: str, value: Any) -> None:
    """Set ``value`` at a dotted path below ``root``, with plain modules for the missing parts."""
    *parents, leaf = path.split(".")
    owner: Any = root
    for atom in parents:
        if not hasattr(owner, atom):
            setattr(owner, atom, nn.Module())
        owner = attribute(owner, atom)
    if getattr(owner, leaf, None) is value:
        return
    if isinstance(value, nn.Module) or not hasattr(value, "requires_grad") or isinstance(value, nn.Parameter):
        setattr(owner, leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=False)
