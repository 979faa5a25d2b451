"""``torch.compile(model, backend="fxpeft")``: graph passes over what Dynamo captured, then Inductor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.errors import AdapterError
from fxpeft.passes.backend.clean import CleanPass
from fxpeft.passes.backend.fold_inactive import FoldInactivePass
from fxpeft.passes.backend.group import GroupPass
from fxpeft.passes.captured.dynamo import parameter_path, source_name
from fxpeft.passes.meta import GROUPED
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.rewrite.subgraphs import copy_graph_module
from fxpeft.passes.slots.slot import NEUTRAL, Slot, slot_of
from fxpeft.passes.slots.stack import Stack, stack_of

PASSES = ("fold_inactive", "group", "clean")
DEFAULT = ("fold_inactive", "clean")  # group: no size was measured to gain, and the grouped A's are there twice


def compile(
    model: nn.Module,
    *,
    passes: Collection[str] = DEFAULT,
    inner: str | Callable[..., Any] = "inductor",
    dump: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
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
        inner: the backend that gets the graphs.
        dump: folder for the graphs before and after each pass, in ``graph-<number>-idle`` and ``-active``.
        options: the inner backend's options.
        torch_options: ``fullgraph``, ``dynamic`` and so on, as in ``torch.compile``.

    Raises:
        AdapterError: an unknown pass.
    """
    own: Any = {"passes": tuple(passes), "inner": inner, "dump": dump, "options": dict(options or {})}
    _check(own["passes"])
    return torch.compile(model, backend=backend, options=own, **torch_options)


def backend(
    graph_module: GraphModule, example_inputs: list[Any], options: Mapping[str, Any] | None = None, **more: Any
) -> Callable[..., Any]:
    """The backend that the entry point ``fxpeft`` names; ``options`` are those of :func:`compile`."""
    own = dict(options or {})
    passes, inner = own.pop("passes", DEFAULT), own.pop("inner", "inductor")
    dump, inner_options = own.pop("dump", None), {**own.pop("options", {}), **own}
    _check(passes)
    lower = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    if inner_options:
        more = {**more, "options": inner_options}
    slots = _slots(graph_module)
    if not slots:
        return lower(graph_module, example_inputs, **more)
    clean = [CleanPass(set(slots))] if "clean" in passes else []
    folder = None if dump is None else _next_folder(Path(dump))
    idle = None
    if "fold_inactive" in passes:
        known = {name: value for name, (_, value) in slots.items() if value is not None}
        pipeline = Pipeline([FoldInactivePass(known), *clean], dump=folder and f"{folder}-idle")
        folded = pipeline(_copy(graph_module))
        if pipeline.reports[0].matched:
            idle = lower(folded, example_inputs, **more)
    group = [GroupPass(*_stackable(graph_module, slots))] if "group" in passes else []
    pipeline = Pipeline([*group, *clean], dump=folder and f"{folder}-active")
    changed = pipeline(_copy(graph_module)) if pipeline.passes else graph_module
    active = changed if any(report.matched for report in pipeline.reports) else graph_module
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    groups = group[0].groups if group else ()
    stacks = {names.index(g.place): [names.index(member) for member in g.members] for g in groups}
    placeholders = (n for n in active.graph.nodes if n.op == "placeholder")
    pairs = zip(placeholders, example_inputs, strict=True)
    given = [n.meta["example_value"] if GROUPED.has(n) else value for n, value in pairs]
    full = lower(active, given, **more)
    if stacks:
        full = _with_stacks(full, stacks)
    if idle is None:
        return full
    return _choose(idle, full, [i for i, name in enumerate(names) if slots.get(name, ("", 0))[0] == "d"])


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


def _stackable(
    graph_module: GraphModule, slots: Mapping[str, tuple[str, int | None]]
) -> tuple[dict[str, str | None], dict[str, str]]:
    """The placeholders that carry an A -> why it can't be stacked, if so, and -> its site's name."""
    why: dict[str, str | None] = {}
    names = {}
    for node in graph_module.graph.nodes:
        if slots.get(node.name, ("", None))[0] != "a":
            continue
        a = node.meta["grapharg"].example
        slot = slot_of(a)
        assert slot is not None
        why[node.name] = None
        if "g_in" in slot.features:
            why[node.name] = "multiplies its input by a gain of its own"
        elif a.requires_grad:
            why[node.name] = "its A is trained"
        elif a.is_inference():
            why[node.name] = "its slot was made in inference mode, where torch counts no writes"
        elif type(a) is not Tensor:
            why[node.name] = f"its A is a {type(a).__name__}"
        source = source_name(node)
        path = None if source is None else parameter_path(source)
        names[node.name] = node.name if path is None else path.removesuffix(".slot.a")
    return why, names


def _copy(graph_module: GraphModule) -> GraphModule:
    """A graph of Dynamo's that passes can change, still known as such: AOTAutograd asks where inputs come from."""
    copied = copy_graph_module(graph_module)
    if hasattr(graph_module, "_param_name_to_source"):
        copied._param_name_to_source = graph_module._param_name_to_source
    for old, new in zip(graph_module.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _next_folder(root: Path) -> Path:
    """A name for the next graph's dumps: every graph break makes one more graph."""
    number = 1 + max((int(p.name.split("-")[1]) for p in root.glob("graph-*")), default=0)
    return root / f"graph-{number:02d}"


def _slots(graph_module: GraphModule) -> dict[str, tuple[str, int | None]]:
    """Placeholder -> which part of a slot it carries, and the number that it is full of in an idle one."""
    found: dict[str, tuple[str, int | None]] = {}
    for node in graph_module.graph.nodes:
        example = getattr(node.meta.get("grapharg"), "example", None) if node.op == "placeholder" else None
        if isinstance(example, Tensor):
            slot: Slot | None = slot_of(example)
            if slot is not None:
                name = next(name for name, buffer in slot._buffers.items() if buffer is example)
                found[node.name] = (name, NEUTRAL.get(name))
    return found


def _check(passes: Any) -> None:
    unknown = [name for name in passes if name not in PASSES]
    if isinstance(passes, str) or unknown:
        raise AdapterError(f"passes: expected some of {', '.join(PASSES)}, found {passes!r}")
