"""One backend pass on one graph: what it gives back is checked, and what goes wrong names the pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxpeft.passes.backend.backend_pass import BackendPass, Context
from fxpeft.passes.base import PassError, RewriteResult, attribute, tensor_of
from fxpeft.passes.captured.dynamo import name_operands
from fxpeft.passes.torch_private import key_graph, pytree, symbolic_sizes


class Step:
    """A pass with the context of one graph, for a :class:`~fxpeft.passes.Pipeline`.

    After a call, ``modified`` says whether the pass changed the graph.
    """

    def __init__(self, backend_pass: BackendPass, context: Context) -> None:
        self.backend_pass, self.context, self.modified = backend_pass, context, False
        self.name = backend_pass.name

    def __call__(self, graph_module: GraphModule) -> RewriteResult:
        """Run the pass.

        Raises:
            PassError: it failed; it changed what the graph takes or returns, or a graph that it says to be unchanged.
        """
        before, taken, returned = list(_nodes(graph_module)), _takes(graph_module), _returns(graph_module)
        try:
            result = self.backend_pass(graph_module, context=self.context)
        except Exception as error:
            kind = "" if isinstance(error, PassError) else f"{type(error).__name__}: "
            raise PassError(f"pass {self.name}: {kind}{error}") from error
        if not isinstance(result, RewriteResult):
            raise PassError(f"pass {self.name}: expected a RewriteResult from it, found {type(result).__name__}")
        made = result.graph_module
        self.modified = result.modified
        if result.modified:
            name_operands(made)
            _fill_values(made, self.name)
            _check(self.name, "takes", taken, _takes(made))
            _check(self.name, "returns", returned, _returns(made))
        elif made is not graph_module or list(_nodes(made)) != before:
            raise PassError(f"pass {self.name}: changed the graph and says that it did not: give modified=True")
        report = replace(result.report, nodes_before=len(before), nodes_after=len(made.graph.nodes))
        return RewriteResult(made, result.modified, report)


def keyed(graph_module: GraphModule, passes: Sequence[BackendPass]) -> GraphModule:
    """The graph, which these passes changed, with their uuids in torch's key of it; without a key if one has none."""
    known = [(each.name, each.uuid) for each in passes if each.uuid is not None]
    key_graph(graph_module, tuple(known) if len(known) == len(passes) else None)
    return graph_module


def _nodes(graph_module: GraphModule) -> Iterator[tuple[object, ...]]:
    """All that code is made from."""
    return ((node, node.op, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes)


def _takes(graph_module: GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]


def _returns(graph_module: GraphModule) -> list[str | None]:
    """What is known of each output."""
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    return [_form(leaf) for leaf in pytree.tree_leaves(output.args)]


def _form(output: object) -> str | None:
    """A tensor's dtype, device and sizes, those that are symbolic left open; ``None``: not known, or no tensor."""
    tensor = tensor_of(output) if isinstance(output, Node) else None
    if tensor is None:
        return None
    sizes = ", ".join(str(size) if isinstance(size, int) else "?" for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} [{sizes}] on {tensor.device}"


def _check(name: str, what: str, before: Sequence[str | None], after: Sequence[str | None]) -> None:
    if len(before) != len(after):
        raise PassError(f"pass {name}: what the graph {what}: expected {len(before)} values, found {len(after)}")
    for number, (expected, found) in enumerate(zip(before, after, strict=True)):
        if None not in (expected, found) and expected != found:
            raise PassError(f"pass {name}: what the graph {what}, number {number}: expected {expected}, found {found}")


def _fill_values(graph_module: GraphModule, name: str) -> None:
    """Give new nodes values, as Dynamo does: torch caches no graph without them, and later passes read them."""
    nodes = graph_module.graph.nodes
    mode = next((m for n in nodes if (m := getattr(tensor_of(n), "fake_mode", None)) is not None), None)
    if mode is None:
        return
    for node in nodes:
        if _has_value(node):
            continue
        try:
            with mode, symbolic_sizes():
                if node.op == "get_attr":
                    held = attribute(graph_module, str(node.target))
                    if isinstance(held, Tensor):
                        node.meta["example_value"] = mode.from_tensor(held)
                elif node.op in ("call_function", "call_method") and all(map(_has_value, node.all_input_nodes)):
                    node.meta["example_value"] = _run(node)
        except Exception as error:
            raise PassError(f"pass {name}: its node {node.format_node()}: {error}") from error


def _has_value(node: Node) -> bool:
    return "example_value" in node.meta or "val" in node.meta


def _run(node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value", n.meta.get("val")))
    run = getattr(type(args[0]), node.target) if isinstance(node.target, str) else node.target
    return run(*args, **kwargs)
