"""Clean: a graph in; out, without what reads a slot for nobody."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxpeft.passes.backend.backend_pass import BackendPass, Context
from fxpeft.passes.backend.writes import may_write
from fxpeft.passes.base import Report, RewriteResult, node_of
from fxpeft.passes.meta import FOLDED
from fxpeft.passes.rewrite.subgraphs import calls


class CleanPass(BackendPass):
    """Erase nodes that have no user, depend on a slot or were folded, and do nothing but compute.

    Placeholders stay, and so do the operands of bodies: callers go on handing them in.
    """

    name = uuid = "clean"

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        gone = _clean(graph_module, {n for n in graph_module.graph.nodes if n.name in context.slots})
        return RewriteResult(graph_module, bool(gone), Report(self.name, tuple(gone)))


def _clean(gm: GraphModule, slots: set[Node]) -> list[str]:
    gone = []
    for call in calls(gm):
        for body in call.bodies():
            inner = _clean(body, {p for p, operand in call.inputs(body) if node_of(operand) in slots})
            if inner:
                gone += inner
                body.recompile()
    entered = {call.node for call in calls(gm)}
    depends = set(slots)
    for node in gm.graph.nodes:
        reads = FOLDED.has(node) or any(n in depends for n in node.all_input_nodes)
        if node not in entered and node.op != "output" and reads:
            depends.add(node)
    for node in reversed(list(gm.graph.nodes)):
        if node in depends and node.op != "placeholder" and not node.users and not may_write(node):
            gm.graph.erase_node(node)
            gone.append(node.name)
    return gone
