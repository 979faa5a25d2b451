"""``torch.compile(model, backend="fxpeft")``: graph passes over what Dynamo captured, then Inductor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.fx import GraphModule

from fxpeft.errors import AdapterError
from fxpeft.passes.backend.backend_pass import ACTIVE, IDLE, BackendPass, Context, context_of, idle_values
from fxpeft.passes.backend.group import groups_of
from fxpeft.passes.backend.registry import NAMES as PASSES
from fxpeft.passes.backend.registry import chosen
from fxpeft.passes.backend.step import Step, keyed
from fxpeft.passes.base import PassError
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.rewrite.subgraphs import copy_graph_module
from fxpeft.passes.slots.slot import slot_of
from fxpeft.passes.slots.stack import Stack, stack_of
from fxpeft.passes.torch_private import inner_backend, keep_sources

__all__ = ["DEFAULT", "PASSES", "backend", "compile"]
DEFAULT = ("fold_inactive", "clean")  # group: no size was measured to gain, and the grouped A's are there twice


def compile(
    model: nn.Module,
    *,
    passes: Collection[str | BackendPass] = DEFAULT,
    inner: str | Callable[..., Any] = "inductor",
    dump: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **torch_options: Any,
) -> Any:
    """``torch.compile`` of a prepared model with fxpeft's graph passes.

    Args:
        passes: those that are named are on; all but ``"group"`` by default.
            ``"fold_inactive"``: each graph is compiled a second time for slots that hold nothing, and a
            call runs the one that fits. An adapter that is off costs what the bare model costs, and one that
            comes back compiles nothing; the first compile takes about twice as long.
            ``"group"``: slots that read one input share one product with a stack of their A's, which is
            kept beside them: the A's of grouped sites are there twice. The first forward after a
            swap copies those in use; a swap itself costs the same.
            ``"clean"``: what the other passes left without a reader is not in the graphs. Inductor drops it
            anyway; an inner backend that runs graphs as they are would compute it.
            Your own are :class:`fxpeft.passes.BackendPass` objects, which run where they stand in the sequence, on
            graphs without slots too; the named ones run in the order above.
        inner: the backend that gets the graphs.
        dump: folder for the graphs before and after each pass, in ``graph-<number>-idle`` and ``-active``.
        options, mode: the inner backend's options, or its mode, as in ``torch.compile``.
        torch_options: ``fullgraph``, ``dynamic`` and so on, as in ``torch.compile``.

    Raises:
        AdapterError: an unknown pass, options beside a mode, or what Inductor doesn't know of these.
    """
    given = dict(options or {})
    of_dynamo = {"guard_filter_fn": given.pop("guard_filter_fn")} if "guard_filter_fn" in given else {}
    dynamic = torch_options.get("dynamic")
    if mode is not None and (given or of_dynamo):
        raise AdapterError(f"mode, options: expected one of the two, found {mode!r} and {', '.join(options or {})}")
    _inner(inner, mode, given, dynamic)  # what is wrong with them is told now
    # torch runs what it compiled before for equal options, and a pass may have changed since
    uuids = tuple(each.uuid or object() for each in _chosen(passes))
    own: Any = {"passes": tuple(passes), "uuids": uuids, "inner": inner, "dump": dump, "options": given}
    own |= {"mode": mode, "dynamic": dynamic, **of_dynamo}
    return torch.compile(model, backend=backend, options=own, **torch_options)


def backend(
    graph_module: GraphModule,
    example_inputs: list[Any],
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that the entry point ``fxpeft`` names; ``options`` and ``mode`` are those of :func:`compile`."""
    own = dict(options or {})
    passes, inner = _chosen(own.pop("passes", DEFAULT)), own.pop("inner", "inductor")
    dump, inner_options, _ = own.pop("dump", None), own.pop("options", {}), own.pop("uuids", None)
    mode, dynamic = own.pop("mode", mode), own.pop("dynamic", None)
    inner_options = {**inner_options, **own}
    lower = _inner(inner, mode, inner_options, dynamic)
    context = context_of(graph_module, inner_options)
    if not context.slots:
        passes = tuple(each for each in passes if each.name not in PASSES)
    folder = None if dump is None or not passes else _next_folder(Path(dump))
    idle = None
    if context.slots and any(ACTIVE not in each.graphs for each in passes):
        for_idle = replace(context, values=idle_values(context))
        folded, changed = _run(graph_module, passes, IDLE, for_idle, folder)
        if any(ACTIVE not in each.graphs for each in changed):
            idle = lower(folded, example_inputs)
    active, _ = _run(graph_module, passes, ACTIVE, context, folder)
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    stacks = {names.index(g.place): [names.index(member) for member in g.members] for g in groups_of(active)}
    placeholders = [n for n in active.graph.nodes if n.op == "placeholder"]
    given = [placeholders[i].meta["example_value"] if i in stacks else x for i, x in enumerate(example_inputs)]
    full = lower(active, given)
    if stacks:
        full = _with_stacks(full, stacks)
    if idle is None:
        return full
    places = [i for i, name in enumerate(names) if name in context.slots and context.slots[name].part == "d"]
    return _choose(idle, full, places)


def _inner(
    inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any], dynamic: bool | None
) -> Callable[..., Callable[..., Any]]:
    try:
        return inner_backend(inner, mode, options, dynamic)
    except RuntimeError as error:
        raise AdapterError(f"mode, options: {error}") from None


def _run(
    graph_module: GraphModule, passes: Sequence[BackendPass], graph: str, context: Context, folder: Path | None
) -> tuple[GraphModule, list[BackendPass]]:
    """A copy of the graph after the passes for one of the two graphs, and those that changed it; else itself."""
    steps = [Step(each, context) for each in passes if graph in each.graphs]
    if not steps:
        return graph_module, []
    made = Pipeline(steps, dump=folder and f"{folder}-{graph}")(_copy(graph_module))
    changed = [step.backend_pass for step in steps if step.modified]
    return (keyed(made, changed), changed) if changed else (graph_module, [])


def _chosen(passes: Collection[str | BackendPass]) -> tuple[BackendPass, ...]:
    try:
        return chosen(passes)
    except PassError as error:
        raise AdapterError(str(error)) from None


def _choose(idle: Callable[..., Any], full: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """Run the graph without slots where every slot of the call holds nothing.

    The slots are those of the arguments: layers that were compiled once share this function.
    """

    def run(*args: Any) -> Any:
        for place in places:
            slot = slot_of(args[place])
            if slot is None or not slot.idle:
                return full(*args)
        return idle(*args)

    return run


def _with_stacks(grouped: Callable[..., Any], stacks: Mapping[int, Sequence[int]]) -> Callable[..., Any]:
    """Hand in stacks: argument -> the arguments whose A's it takes; again those of the call's own slots."""

    known = [(place, itemgetter(*members), WeakValueDictionary[int, Stack]()) for place, members in stacks.items()]

    def run(*args: Any) -> Any:
        given = list(args)
        for place, sources, before in known:
            given[place] = stack_of(sources(args), before)
        return grouped(*given)

    return run


def _copy(graph_module: GraphModule) -> GraphModule:
    """A graph of Dynamo's that passes can change, still known as such: AOTAutograd asks where inputs come from."""
    copied = copy_graph_module(graph_module)
    keep_sources(graph_module, copied)
    return copied


def _next_folder(root: Path) -> Path:
    """A name for the next graph's dumps: every graph break makes one more graph."""
    number = 1 + max((int(p.name.split("-")[1]) for p in root.glob("graph-*")), default=0)
    return root / f"graph-{number:02d}"
