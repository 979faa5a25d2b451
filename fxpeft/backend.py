"""``torch.compile(model, backend="fxpeft")``: graph passes over what Dynamo captured, then Inductor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxpeft.errors import AdapterError
from fxpeft.passes.clean import CleanPass
from fxpeft.passes.fold_inactive import FoldInactivePass
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.slot import NEUTRAL, Slot, slot_of
from fxpeft.passes.subgraphs import copy_graph_module

PASSES = ("fold_inactive",)


def compile(
    model: nn.Module,
    *,
    passes: Collection[str] = PASSES,
    inner: str | Callable[..., Any] = "inductor",
    dump: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **torch_options: Any,
) -> Any:
    """``torch.compile`` of a prepared model with fxpeft's graph passes.

    Args:
        passes: ``"fold_inactive"``: each graph is compiled a second time for slots that hold nothing, and a
            call runs the one that fits. An adapter that is off costs what the bare model costs, and one that
            comes back compiles nothing; the first compile takes about twice as long.
        inner: the backend that gets the graphs.
        dump: folder for the graphs before and after each pass.
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
    passes, inner = own.pop("passes", PASSES), own.pop("inner", "inductor")
    dump, inner_options = own.pop("dump", None), {**own.pop("options", {}), **own}
    _check(passes)
    lower = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    if inner_options:
        more = {**more, "options": inner_options}
    slots = _slots(graph_module)
    idle = None
    if slots and "fold_inactive" in passes:
        known = {name: value for name, (_, value) in slots.items() if value is not None}
        pipeline = Pipeline([FoldInactivePass(known), CleanPass(set(slots))], dump=dump)
        folded = pipeline(copy_graph_module(graph_module))
        if pipeline.reports[0].matched:
            idle = lower(folded, example_inputs, **more)
    full = lower(graph_module, example_inputs, **more)
    if idle is None:
        return full
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
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
