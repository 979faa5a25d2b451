"""Feed: a graph that is one call of a whole model in; out, a function gives that call its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, TracedModule, join
from fxpeft.passes.meta import CALL, REWRITE
from fxpeft.passes.rewrite.inject import get_attr, install

LEAF = "base_forward"  # a module's own forward, where a graph calls it and torch.fx doesn't look inside


@dataclass(frozen=True)
class Feed:
    """What stands between the arguments of a model's forward and the model.

    Args:
        name: stands in reports and on every new node, as in ``prompt_tuning:default``.
        function: ``function(inputs, **operands, **reads, **constants) -> inputs``, where inputs is
            a dict of the forward's arguments by name. Any traceable Python: it stays one call.
        operands: path below ``container`` -> tensor, or module whose call without arguments gives
            one; with the argument of ``function`` that takes it.
        reads: argument of ``function`` -> dotted path of what it reads in the model itself.
        constants: further arguments of ``function``: numbers and strings.
        mixin: what the bound class has besides; see :func:`fxpeft.passes.live.feed_module`.
        takes: arguments that the model's own forward doesn't have and ``function`` takes out of the inputs.
        finish: ``finish(output, inputs, **constants) -> output``, of the model's output and the arguments as they
            came; ``None``: the output is what the model gives.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    operands: Mapping[str, tuple[str, Any]]
    reads: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    container: str = "adapters"
    mixin: type | None = None
    takes: tuple[str, ...] = ()
    finish: Callable[..., Any] | None = None

    def signature(self) -> tuple[Any, ...]:
        """What the fed graph depends on, the operands' values left out."""
        operands = tuple((path, name, isinstance(value, nn.Module)) for path, (name, value) in self.operands.items())
        constants = tuple((name, type(value), value) for name, value in self.constants.items())
        return self.function, operands, tuple(self.reads.items()), constants, self.container, self.takes, self.finish


class FeedPass(GraphPass):
    """Let a function prepare the inputs of the graph's one call of a model (see :func:`call_graph`).

    Raises:
        PassError: the graph has no such call.
    """

    name = "feed"

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph, feed = graph_module.graph, self.feed
        before = len(graph.nodes)
        call = next((n for n in graph.nodes if CALL.has(n)), None)
        if call is None:
            raise PassError("expected a graph that is one call of a model, found none; make it with call_graph")
        if CALL.of(call):
            return RewriteResult(graph_module, False, Report(self.name, (), (), before, before))
        with graph.inserting_before(call):
            arguments: dict[str, Any] = {}
            for path, (argument, value) in feed.operands.items():
                arguments[argument] = _operand(graph_module, join(feed.container, path), value)
            for argument, path in feed.reads.items():
                install(graph_module, path, _Stand())
                arguments[argument] = get_attr(graph, path)
            given = call.args[1]
            fed = graph.call_function(feed.function, (given,), {**arguments, **feed.constants})
        call.args = (call.args[0], fed)
        if feed.finish is not None:
            with graph.inserting_after(call):
                finished = graph.call_function(feed.finish, (call, given), dict(feed.constants))
            call.replace_all_uses_with(finished, lambda user: user is not finished)
            REWRITE.set(finished, (feed.name,))
        CALL.set(call, (feed.name,))
        for node in (*arguments.values(), fed):
            REWRITE.set(node, (feed.name,))
        return RewriteResult(graph_module, True, Report(self.name, ("",), (), before, len(graph.nodes)))


def call_graph(forward: Callable[..., Any], more: Sequence[str] = ()) -> GraphModule:
    """The graph that does nothing but call a bound forward with its own arguments, under their own names.

    Args:
        more: arguments beside its own, ``None`` by default.

    Raises:
        PassError: the forward takes ``*args``, or positional arguments without a name.
    """
    graph, named = Graph(), {}
    others: str | None = None
    for p in inspect.signature(forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY):
            raise PassError(f"expected a forward whose arguments have names, found {p}")
        if p.kind is p.VAR_KEYWORD:
            others = p.name
        else:
            named[p.name] = graph.placeholder(p.name, None, *(() if p.default is p.empty else (p.default,)))
    for name in more:
        if name not in named:
            named[name] = graph.placeholder(name, None, None)
    rest = None if others is None else graph.placeholder(f"**{others}")
    base = get_attr(graph, LEAF)
    inputs = graph.call_function(gather, (named,) if rest is None else (named, rest))
    call = graph.call_function(spread, (base, inputs))
    CALL.set(call, ())
    graph.output(call)
    root = nn.Module()
    root.add_module(LEAF, _Stand())
    return TracedModule(root, graph)


def gather(named: dict[str, Any], rest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A call's arguments as one dict."""
    return {**named, **(rest or {})}


def spread(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """Call with arguments by name."""
    return forward(**inputs)


class _Stand(nn.Module):
    """Stands in a graph for what the code finds in the live model."""


def _operand(gm: GraphModule, path: str, value: Any) -> Node:
    if isinstance(value, nn.Module):
        install(gm, path, _Stand())
        return gm.graph.call_module(path)
    install(gm, path, value)
    return get_attr(gm.graph, path)
