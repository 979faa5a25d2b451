"""Rewriting one live module: its graph is rewritten, and the generated code becomes its forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Graph

from fxpeft.passes.base import PassError
from fxpeft.passes.container import Container
from fxpeft.passes.live.bind import bind_source
from fxpeft.passes.live.generated import MEMBERS, generated_source
from fxpeft.passes.live.instance import base_class, given_forward, is_bound, named_forward
from fxpeft.passes.live.reading import elsewhere
from fxpeft.passes.live.recompute import RecomputePass
from fxpeft.passes.live.signature import signature
from fxpeft.passes.live.tracing import trace_any, trace_module
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.recent import Recent
from fxpeft.passes.rewrite.feed import LEAF, Feed, FeedPass, call_graph
from fxpeft.passes.rewrite.inject import InjectPass, Rewrite
from fxpeft.passes.rewrite.redirect import RedirectPass
from fxpeft.passes.source import check_plain, graph_source

_sources: Recent[tuple[Any, ...], str] = Recent()


def rewrite_module(
    module: nn.Module,
    rewrites: Sequence[Rewrite],
    *,
    name: str,
    redirects: Mapping[str, tuple[str, Any]] | None = None,
    container: str = "adapters",
    alone: bool = False,
    rows: bool = False,
    dump: str | None = None,
) -> None:
    """Trace ``module``, let it read ``redirects``, inject ``rewrites`` in order, bind the result.

    The operands have to be reachable from the module itself at ``container.path``; the graph only
    names them. Without rewrites the module need not be of a known kind. Code that reads a redirected attribute
    without calling the module gets the operand too.

    Args:
        name: the module's dotted name, for messages.
        redirects: attribute -> (path of the operand, operand), as in :class:`RedirectPass`.
        container: where the redirects' operands are; each rewrite names its own.
        alone: refuse code that computes with the module's ``weight`` without calling it; see
            :mod:`fxpeft.passes.live.reading`.
        rows: as of :func:`trace_module`.
        dump: folder for the graphs before and after, as in :class:`Pipeline`.

    Raises:
        PassError: the module can't take the rewrite; it is unchanged then.
    """
    redirects = redirects or {}
    own = signature(module)
    asked = ((k, path, container) for k, (path, _) in redirects.items())
    key = own and (own, rows, *(r.signature() for r in rewrites), *asked)
    source = _sources.recent(key) if key and dump is None else None
    if source is None:
        passes = [RedirectPass({"": redirects}, container=container), InjectPass({"": rewrites}), RecomputePass()]
        try:
            traced = trace_module(module, rows=rows) if rewrites else trace_any(module)
            source = graph_source(_read_in_place(Pipeline(passes, dump=dump)(traced).graph))
        except PassError as error:
            raise PassError(f"{name}: {error}") from None
        if key:
            _sources[key] = source
    attributes = {"weight": f"past('weight', {name!r})"} if alone else {}
    attributes |= {leaf: _elsewhere(leaf, _access(f"{container}.{path}")) for leaf, (path, _) in redirects.items()}
    bind_source(module, _members(source, attributes))


def _read_in_place(graph: Graph) -> Graph:
    """Let a graph that calls the module as a leaf read that leaf's tensors where they are: in the module itself."""
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(f"{LEAF}.")
    return graph


def replace_module(module: nn.Module, path: str, *, called: str = "") -> None:
    """Let another module, reachable at ``path`` from ``module``, answer for it.

    It answers all calls, and reads of the module's parameters, buffers and children: code that reads a head's
    ``weight`` without calling the head gets the weight that a call computes with. Lists of parameters, as
    ``state_dict`` and ``named_modules`` make them, stay the module's own, and so does what accelerate's hooks and FSDP
    read to fetch the module's own weights.

    Args:
        called: where another one is that answers the calls, since rows of a batch have copies of their own; reads
            past it are refused while they have.
    """
    access, calls = _access(path), _access(called or path)
    held = (*module._parameters.items(), *module._buffers.items(), *module._modules.items())
    names = [key for key, value in held if value is not None and not isinstance(value, Container)]
    source = f"def forward(self, *args, **kwargs):\n    return {calls}(*args, **kwargs)\n"
    make = _of_no_row if called else _elsewhere
    bind_source(module, _members(source, {name: make(name, f"getattr({access}, {name!r})") for name in names}))


def _access(path: str) -> str:
    """Code that reads a dotted path below a module."""
    access = "self"
    for atom in check_plain(path).split("."):
        access = f"getattr({access}, {atom!r})"
    return access


def _elsewhere(name: str, code: str) -> str:
    """Code that makes an attribute which another answers for, from the code that reads it there."""
    return f"elsewhere({name!r}, lambda self: {code})"


def _of_no_row(name: str, code: str) -> str:
    """The same, of a module of which rows of a batch may have copies of their own."""
    return f"of_no_row({name!r}, lambda self: {code})"


def _members(source: str, attributes: Mapping[str, str]) -> str:
    """The source of a forward, with attributes beside it: name -> the code that makes the attribute."""
    if not attributes:
        return source
    makers = {code.partition("(")[0] for code in attributes.values()}
    imports = f"from {elsewhere.__module__} import {', '.join(sorted(makers))}\n"
    lines = "".join(f"    {name!r}: {code},\n" for name, code in attributes.items())
    return f"{imports}{'' if source.startswith(('import ', 'from ')) else chr(10)}{source}{MEMBERS}{{\n{lines}}}\n"


def feed_module(module: nn.Module, feed: Feed, *, name: str, dump: str | None = None) -> None:
    """Let ``feed`` prepare the inputs of every call of ``module``, whatever its own forward is.

    With a mixin the bound class is ``class X(mixin, X)``: methods that work with the forward's
    inputs too, as those of ``generate``. It keeps its name, since whole models are looked up by it.

    Raises:
        PassError: the forward's arguments have no names; the module is unchanged then.
    """
    given, cls = given_forward(module), base_class(module)
    key = None if given is not None else (cls, cls.forward, *feed.signature())
    source = _sources.recent(key) if key and dump is None else None
    if source is None:
        try:
            graph = call_graph(named_forward(module), feed.takes)
            source = graph_source(Pipeline([FeedPass(feed)], dump=dump)(graph).graph)
        except PassError as error:
            raise PassError(f"{name or cls.__name__}: {error}") from None
        if key:
            _sources[key] = source
    bind_source(module, source, feed.mixin)


def forward_text(module: nn.Module) -> str:
    """A module's forward as source: its own graph, or the rewritten one that it runs now."""
    if not is_bound(module):
        return graph_text(trace_module(module))
    return generated_source(module).partition(MEMBERS)[0].partition("\n\n")[2].lstrip()
