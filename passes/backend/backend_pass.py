"""What a pass over a captured graph is, fxpeft's own and yours, and what it is told of the graph."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from fxpeft.passes.base import RewriteResult
from fxpeft.passes.captured.dynamo import parameter_path, source_name
from fxpeft.passes.slots.slot import NEUTRAL, slot_of

IDLE, ACTIVE = "idle", "active"  # a graph for slots that hold nothing, and the one for all others


@dataclass(frozen=True)
class SlotTensor:
    """A placeholder's tensor, which belongs to a slot.

    Args:
        part: which of the slot's tensors it is: ``"a"``, ``"b"``, ``"d"``, or one of its features.
        site: the slot's site, as it is called in reports.
        tensor: the tensor itself, which later adapters are copied into.
        features: which of ``g_in``, ``g_out``, ``shift``, ``rotation``, ``w1`` and ``w2`` the slot has.
    """

    part: str
    site: str
    tensor: Tensor
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What is known of a graph beside the graph: what :class:`BackendPass` is given.

    Args:
        slots: placeholder -> the slot's tensor that it carries.
        values: placeholder -> the number, 0 or 1, that all of its elements are in this graph. Empty in the
            graph for slots in use; without it a slot's values are not known, for swaps write them.
        options: the inner backend's options, as the user gave them.
    """

    slots: Mapping[str, SlotTensor] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


class BackendPass(abc.ABC):
    """A pass over what Dynamo captured, before Inductor gets it: ``fxpeft.compile(model, passes=(..., MyPass()))``.

    A subclass sets ``name`` and implements :meth:`__call__`. One object serves every graph of a model, on several
    threads perhaps. It edits the graph, or hands back another graph module; where it says ``modified`` the runner
    lints and recompiles, and gives new nodes their ``example_value``. A tensor that it brings is a buffer or parameter
    of the graph module, read by a ``get_attr`` node; its values may change later, in place. What the graph takes and
    returns stays as it was, or the pass is refused.

    ``graphs``: on which graphs it runs, those for slots that hold nothing (``"idle"``) and those for all others.

    ``uuid``: what tells this pass from others, and from itself once its code or settings are changed. It becomes a
    part of the key under which torch keeps compiled code for later processes. ``None``: a graph that the pass changed
    is compiled anew in each.
    """

    name: ClassVar[str]
    graphs: ClassVar[tuple[str, ...]] = (IDLE, ACTIVE)
    uuid: str | bytes | None = None

    @abc.abstractmethod
    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        """Rewrite the graph, and say what was matched and whether anything changed."""


def context_of(graph_module: GraphModule, options: Mapping[str, Any]) -> Context:
    """The context of a graph that Dynamo captured, for slots in use."""
    found: dict[str, SlotTensor] = {}
    for node in graph_module.graph.nodes:
        example = getattr(node.meta.get("grapharg"), "example", None) if node.op == "placeholder" else None
        if not isinstance(example, Tensor):
            continue
        slot = slot_of(example)
        if slot is not None:
            part = next(name for name, buffer in slot._buffers.items() if buffer is example)
            source = source_name(node)
            path = None if source is None else parameter_path(source)
            site = node.name if path is None else path.removesuffix(f".slot.{part}")
            found[node.name] = SlotTensor(part, site, example, slot.features)
    return Context(found, {}, options)


def idle_values(context: Context) -> dict[str, int]:
    """What the slots' tensors are full of where the slots hold nothing."""
    return {name: NEUTRAL[held.part] for name, held in context.slots.items() if held.part in NEUTRAL}
