"""Roles: any graph in; the same graph out, its projections annotated with what they do in the data flow.

A role is a small pattern over the graph of :mod:`fxpeft.passes.targets.flow`, found by networkx's subgraph
matcher; nothing here knows a module's name.

    Role("f:linear -{activation}-> d:linear", {"f": "mlp.gate_up", "d": "mlp.down"})

A pattern is one or more chains, split by ``;``. A vertex is ``name:operation`` where it first stands,
``name`` afterwards, and ``name[1]`` as the operand that an edge leads to (queries 0, keys 1, values 2).
``|`` gives several operations. On the way of an edge may lie whatever has one origin: views, norms,
rotary embeddings; ``-{activation}->`` asks for an activation there, ``-{!activation}->`` for none,
``-{plain}->`` for views only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
from torch.fx import GraphModule

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult
from fxpeft.passes.meta import ROLE
from fxpeft.passes.targets.flow import ACTIVATIONS, MOVES, Flow, flow_of
from fxpeft.passes.targets.kinds import Kind

_WAYS: dict[str, Callable[[Sequence[str]], bool]] = {
    "": lambda via: True,
    "activation": lambda via: any(step in ACTIVATIONS for step in via),
    "!activation": lambda via: not any(step in ACTIVATIONS for step in via),
    "plain": lambda via: all(step in MOVES for step in via),
}
_ARROW = re.compile(r"\s*-(?:\{([^}]*)\}-)?>\s*")
_VERTEX = re.compile(r"(\w+)(?::([\w|]+))?(?:\[(\d)\])?")
Match = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Role:
    """One pattern, and the roles that it gives to its vertices.

    Args:
        pattern: the chains, as the module describes them.
        gives: vertex -> role.
        where: a further condition on the vertices' attributes (``op``, ``site``, ``kind``) and the flow.

    Raises:
        PassError: the pattern can't be read; the message names the part.
    """

    pattern: str
    gives: Mapping[str, str]
    where: Callable[[Match, Flow], bool] = field(default=lambda match, flow: True)

    def __post_init__(self) -> None:
        unknown = [v for v in self.gives if v not in self.graph]
        if unknown:
            raise PassError(f"role pattern {self.pattern!r} has no vertex {', '.join(unknown)}")

    @cached_property
    def graph(self) -> nx.MultiDiGraph:
        """The pattern as a graph."""
        graph = nx.MultiDiGraph()
        for chain in self.pattern.split(";"):
            parts = _ARROW.split(chain.strip())
            previous = ""
            for at in range(0, len(parts), 2):
                read = _VERTEX.fullmatch(parts[at].strip())
                if read is None:
                    raise PassError(f"role pattern {self.pattern!r}: expected name:operation, found {parts[at]!r}")
                name, ops, index = read.groups()
                if ops:
                    graph.add_node(name, ops=frozenset(ops.split("|")))
                elif name not in graph:
                    raise PassError(f"role pattern {self.pattern!r}: {name!r} has no operation; write {name}:linear")
                if at:
                    way = parts[at - 1] or ""
                    if way not in _WAYS:
                        known = ", ".join(w for w in _WAYS if w)
                        raise PassError(f"role pattern {self.pattern!r}: expected one of {known}, found {way!r}")
                    graph.add_edge(previous, name, way=_WAYS[way], index=None if index is None else int(index))
                previous = name
        return graph

    def find(self, flow: Flow) -> list[dict[str, str]]:
        """Every match, in the flow's order: vertex of the pattern -> vertex of the flow."""
        matcher = nx.algorithms.isomorphism.MultiDiGraphMatcher(flow, self.graph, _same_vertex, _same_edges)
        matches = ({own: vertex for vertex, own in m.items()} for m in matcher.subgraph_monomorphisms_iter())
        found = [m for m in matches if self.where({own: flow.nodes[v] for own, v in m.items()}, flow)]
        order = {vertex: at for at, vertex in enumerate(flow)}
        return sorted(found, key=lambda m: [order[m[own]] for own in self.graph])


def _same_vertex(vertex: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return vertex["op"] in wanted["ops"]


def _same_edges(edges: Mapping[int, Mapping[str, Any]], wanted: Mapping[int, Mapping[str, Any]]) -> bool:
    return all(
        any(want["index"] in (None, edge["index"]) and want["way"](edge["via"]) for edge in edges.values())
        for want in wanted.values()
    )


def _kinds(match: Match, *names: str) -> list[Kind] | None:
    found = [match[name]["kind"] for name in names]
    return None if None in found else found


def _widths(times: int) -> Callable[[Match, Flow], bool]:
    """``up`` gives ``times`` as many features as ``down`` takes, and ``down`` as many as ``up`` takes."""

    def check(match: Match, flow: Flow) -> bool:
        kinds = _kinds(match, "up", "down")
        if kinds is None:
            return False
        up, down = kinds
        return up.out_features == times * down.in_features and down.out_features == up.in_features

    return check


def _as_wide_as_a_vocabulary(match: Match, flow: Flow) -> bool:
    kinds = _kinds(match, "head")
    rows = {d["kind"].in_features for _, d in flow.nodes(data=True) if d["op"] == "embedding"}
    return kinds is not None and kinds[0].out_features in rows


def _ends_here(match: Match, flow: Flow) -> bool:
    """Nothing reads ``head`` but outputs, and scores of pairs of them; a projector's features are read on."""
    head = next(vertex for vertex, data in flow.nodes(data=True) if data is match["head"])
    return all(flow.nodes[after]["op"] in ("output", "matmul") for after in flow.successors(head))


def _cuts_patches(match: Match, flow: Flow) -> bool:
    kind = match["patch"]["kind"]
    stride = kind.stride if isinstance(kind.stride, tuple) else (kind.stride,) * len(kind.kernel)
    return bool(stride == kind.kernel and max(kind.kernel) > 1)


def _attention(op: str) -> tuple[Role, ...]:
    return (
        Role(f"x:linear -> a:{op}[0]; x -> a[1]; x -> a[2]", {"x": f"{op}.qkv"}),
        Role(f"x:linear -> a:{op}[1]; x -> a[2]", {"x": f"{op}.kv"}),
        Role(f"x:linear -> a:{op}[0]", {"x": f"{op}.query"}),
        Role(f"x:linear -> a:{op}[1]", {"x": f"{op}.key"}),
        Role(f"x:linear -> a:{op}[2]", {"x": f"{op}.value"}),
        Role(f"a:{op} -> x:linear", {"x": f"{op}.output"}),
    )


#: The roles that are looked for, in order: where two patterns take a vertex, the first one names it.
ROLES: list[Role] = [
    *_attention("attention"),
    *_attention("cross_attention"),
    Role("x:linear -> t:topk", {"x": "router"}),
    Role("x:stacked", {"x": "experts"}),
    Role(
        "gate:linear -{activation}-> p:product; up:linear -{!activation}-> p; p -> down:linear",
        {"gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"},
    ),
    *(
        Role("up:linear -{activation}-> down:linear -> s:sum|product", {"up": up, "down": "mlp.down"}, _widths(times))
        for up, times in (("mlp.gate_up", 2), ("mlp.up", 1))
    ),
    Role("head:linear -> o:output", {"head": "lm_head"}, _as_wide_as_a_vocabulary),
    Role("head:linear -{!activation}-> o:output", {"head": "head"}, _ends_here),
    Role("i:input -{plain}-> token:embedding", {"token": "embedding.token"}),
    Role("i:input -{plain}-> patch:conv", {"patch": "embedding.patch"}, _cuts_patches),
]


def declare(role: Role) -> None:
    """Look for a role of your own too, before all others."""
    if role not in ROLES:
        ROLES.insert(0, role)


def find_roles(flow: Flow, roles: Sequence[Role] | None = None) -> dict[str, str]:
    """Vertex -> role, where one of the patterns takes it; in the flow's order. Default: :data:`ROLES`."""
    found: dict[str, str] = {}
    for role in ROLES if roles is None else roles:
        taken = [(match[own], given) for match in role.find(flow) for own, given in role.gives.items()]
        for vertex, given in taken:
            found.setdefault(vertex, given)
    return {vertex: found[vertex] for vertex in flow if vertex in found}


def roles_of_sites(flow: Flow, roles: Sequence[Role] | None = None) -> dict[str, tuple[str, ...]]:
    """Site -> its roles; a module that is called in several places may have several."""
    found: dict[str, list[str]] = {}
    for vertex, role in find_roles(flow, roles).items():
        own = found.setdefault(flow.nodes[vertex]["site"], [])
        if role not in own:
            own.append(role)
    return {site: tuple(own) for site, own in found.items()}


class RolePass(GraphPass):
    """Annotate nodes with their role: ``ROLE.of(node)``.

    Args:
        roles: the patterns; default: :data:`ROLES` with what was declared.
    """

    name = "roles"

    def __init__(self, roles: Sequence[Role] | None = None) -> None:
        self.roles = roles

    def call(self, graph_module: GraphModule) -> RewriteResult:
        found = find_roles(flow_of(graph_module), self.roles)
        modified = False
        for node in graph_module.graph.nodes:
            role = found.get(node.name)
            modified |= role is not None and ROLE.get(node) != role
            if role is not None:
                ROLE.set(node, role)
        size = len(graph_module.graph.nodes)
        return RewriteResult(graph_module, modified, Report(self.name, tuple(found), (), size, size))
