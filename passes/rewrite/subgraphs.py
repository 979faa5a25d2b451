"""The bodies of higher-order operators (checkpoint, cond, invoke_subgraph, ...), entered as graphs of their own.

A body reads nothing from its surroundings: the caller hands it parameters as operands. So entering
one means to say which parameter each of its placeholders carries, and an adapter's operands are
handed in the same way, by every caller.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxpeft.passes.base import attribute, node_of
from fxpeft.passes.meta import BODY, READS, REDIRECT, REWRITE
from fxpeft.passes.targets.reading import read_path, value_of
from fxpeft.passes.torch_private import HigherOrderOperator


@dataclass(frozen=True)
class _Form:
    """Which arguments are bodies, which tuples (or, from ``rest`` on, arguments) are their operands.

    Args:
        last_of: whether the bodies are the last items of those arguments, tuples.
        own: how many placeholders of a body, the first ones, the operator fills itself.
    """

    bodies: tuple[int, ...]
    tuples: tuple[int, ...] = ()
    rest: int | None = None
    last_of: bool = False
    own: int = 0


# an operator may have several calls: sets of bodies that take the same operands
_FORMS = {
    "cond": (_Form((1, 2), (3,)),),
    "while_loop": (_Form((0, 1), (2, 3)),),
    "map_impl": (_Form((0,), (1, 2)),),
    "scan": (_Form((0,), (1, 2, 3)),),
    "tag_activation_checkpoint": (_Form((0,), rest=1),),
    "wrap_activation_checkpoint": (_Form((0,), rest=1),),
    "wrap": (_Form((0,), rest=1),),
    "wrap_with_set_grad_enabled": (_Form((1,), rest=2),),
    "wrap_with_autocast": (_Form((4,), rest=5),),
    "invoke_subgraph": (_Form((0,), rest=2),),
    # score_mod(score, batch, head, query, key, *buffers) and, in the block mask, mask_mod(batch, ..., *buffers)
    "flex_attention": (_Form((3,), (7,), own=5), _Form((4,), (8,), last_of=True, own=4)),
}


@dataclass(frozen=True)
class Call:
    """One call of a higher-order operator in ``graph_module``."""

    graph_module: GraphModule
    node: Node
    form: _Form

    def reads(self) -> list[Node]:
        """The nodes that read the bodies."""
        places = (self.node.args[i] for i in self.form.bodies)
        found = (node_of(place[-1] if self.form.last_of else place) for place in places)  # type: ignore[index]
        return [n for n in found if n is not None]

    def bodies(self) -> list[GraphModule]:
        """The bodies; all take the same operands."""
        return [attribute(self.graph_module, str(n.target)) for n in self.reads()]

    def operands(self) -> list[object]:
        """What the bodies' placeholders get, in order, but for those that the operator fills itself."""
        args = self.node.args
        if self.form.rest is not None:
            return list(args[self.form.rest :])
        return [operand for i in self.form.tuples for operand in args[i]]  # type: ignore[union-attr]

    def inputs(self, body: GraphModule) -> list[tuple[Node, object]]:
        """A body's placeholders, each with its operand."""
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        return list(zip(placeholders[self.form.own :], self.operands(), strict=True))

    def append(self, operand: Node) -> None:
        """Hand one more operand to the bodies."""
        if self.form.rest is not None:
            self.node.args = (*self.node.args, operand)
            return
        last = self.form.tuples[-1]
        old: Any = self.node.args[last]
        self.node.update_arg(last, (*old, operand) if isinstance(old, tuple) else [*old, operand])

    def drop(self, number: int) -> None:
        """Take the operand at a place back; it has to be one of the appended ones."""
        if self.form.rest is not None:
            kept = list(self.node.args)
            del kept[self.form.rest + number]
            self.node.args = tuple(kept)
            return
        last = self.form.tuples[-1]
        args: Any = self.node.args
        before = sum(len(args[i]) for i in self.form.tuples[:-1])
        old = args[last]
        kept = [*old[: number - before], *old[number - before + 1 :]]
        self.node.update_arg(last, tuple(kept) if isinstance(old, tuple) else kept)


def _name(node: Node) -> str:
    return str(node.target) if isinstance(node.target, HigherOrderOperator) else ""


def calls(graph_module: GraphModule) -> list[Call]:
    """The calls of higher-order operators whose bodies can be entered, in order."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            for form in _FORMS.get(_name(node), ()):
                call = Call(graph_module, node, form)
                if len(node.args) > max(form.bodies + form.tuples) and len(call.reads()) == len(form.bodies):
                    found.append(call)
    return found


def closed(graph_module: GraphModule) -> list[tuple[Node, list[GraphModule]]]:
    """The calls of higher-order operators with bodies that can't be entered, and these bodies."""
    entered = {(call.node, read) for call in calls(graph_module) for read in call.reads()}
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        reads = [n for n in node.all_input_nodes if n.op == "get_attr" and (node, n) not in entered]
        bodies = [attribute(graph_module, str(n.target)) for n in reads]
        if bodies := [body for body in bodies if isinstance(body, GraphModule)]:
            found.append((node, bodies))
    return found


def own_bodies(graph_module: GraphModule) -> None:
    """Copy every body that several calls share, so that each has its own; :func:`share_bodies` is the inverse.

    The shared ones stay beside the copies as they are.
    """
    found = calls(graph_module)
    readers = Counter(str(read.target) for call in found for read in call.reads())
    for number, call in enumerate(found):
        for read in call.reads():
            name, body = str(read.target), attribute(graph_module, str(read.target))
            if readers[name] > 1:
                own_name = f"{name}_own_{number}"
                body = copy_graph_module(body)
                graph_module.add_module(own_name, body)
                with graph_module.graph.inserting_before(call.node):
                    own = graph_module.graph.create_node("get_attr", own_name)
                own.meta = dict(read.meta)
                BODY.set(own, (read.name, _identifier(call, own_name)))
                call.node.replace_input_with(read, own)
            own_bodies(body)


def _identifier(call: Call, name: str) -> str | None:
    """Give an ``invoke_subgraph`` the name by which torch keeps what it made of its body; returns the old one."""
    if _name(call.node) != "invoke_subgraph":
        return None
    old = str(call.node.args[1])
    call.node.update_arg(1, name)
    return old


def share_bodies(graph_module: GraphModule) -> None:
    """Let calls use the bodies they had before :func:`own_bodies`, where nothing was rewritten in their own."""
    by_name = {n.name: n for n in graph_module.graph.nodes}
    for call in calls(graph_module):
        for read, body in zip(call.reads(), call.bodies(), strict=True):
            share_bodies(body)
            if BODY.has(read) and not any(is_rewritten(g) for _, g in walk(body)):
                original, identifier = BODY.of(read)
                call.node.replace_input_with(read, by_name[original])
                if identifier is not None:
                    call.node.update_arg(1, identifier)
                graph_module.graph.erase_node(read)
                delattr(graph_module, str(read.target))


def is_rewritten(graph_module: GraphModule) -> bool:
    """Whether an adapter is in this graph, its bodies left out."""
    return any(REWRITE.has(n) or REDIRECT.has(n) for n in graph_module.graph.nodes)


def walk(graph_module: GraphModule) -> Iterator[tuple[Call | None, GraphModule]]:
    """The graph and every body in it, bodies first, each with the call that it belongs to."""
    for call in calls(graph_module):
        for body in call.bodies():
            for inner, found in walk(body):
                yield inner or call, found
    yield None, graph_module


def annotate_bodies(graph_module: GraphModule) -> None:
    """Let the placeholders of every body know which parameter they carry."""
    for call in calls(graph_module):
        for body in call.bodies():
            if _name(call.node) == "invoke_subgraph":  # traced for one caller, whose modules the nodes would name
                for node in body.graph.nodes:
                    node.meta.pop("nn_module_stack", None)
            for placeholder, operand in call.inputs(body):
                given = node_of(operand)
                path = None if given is None else read_path(given)
                if given is not None and path is not None:
                    READS.set(placeholder, path)
                    if "val" not in placeholder.meta and "example_value" not in placeholder.meta:
                        placeholder.meta["example_value"] = value_of(graph_module, given)
            annotate_bodies(body)


def copy_graph_module(graph_module: GraphModule) -> GraphModule:
    """The same graph with the same parameters, in a module that can be changed; bodies are copied too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec")  # torch's, about itself
        graph = copy.deepcopy(graph_module.graph)
    for old, new in zip(graph_module.graph.nodes, graph.nodes, strict=True):
        new.name = old.name  # a copy renames what is named like a builtin, ``input`` for instance
    made = GraphModule(graph_module, graph, graph_module.__class__.__name__)
    made.meta = dict(graph_module.meta)
    made.training = graph_module.training
    for name in {str(r.target) for call in calls(made) for r in call.reads()}:
        made.add_module(name, copy_graph_module(attribute(graph_module, name)))
    return made
