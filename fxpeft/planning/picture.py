"""A plan as a picture: one layer's data flow, and the same with each site's rewrite drawn in."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.base import SharedPart, SiteAdapter
from fxpeft.passes.draw import Drawing, Picture, colour, drawing_of
from fxpeft.passes.live import trace_module
from fxpeft.passes.meta import TARGET
from fxpeft.passes.rewrite.inject import InjectPass, Rewrite
from fxpeft.passes.targets.flow import Flow
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.registry import operation_of_kind
from fxpeft.passes.targets.patterns import layers_of
from fxpeft.passes.targets.roles import find_roles
from fxpeft.planning.data import PlanData


def draw_plan(plan: PlanData, layer: int) -> Picture:
    """See :meth:`fxpeft.Plan.draw`."""
    if plan.flow is None:
        raise AdapterError("this plan has no data flow to draw: make it with fxpeft.plan(model, config)")
    if method_of(plan.config).feeds:
        raise AdapterError(f"{type(plan.config).__name__} rewrites no site, so that there is none to draw")
    prefix, vertices = _layer(plan, plan.flow, layer)
    before = _drawing(plan.flow, vertices, prefix)
    after = before.copy()
    planned = {site.name for site in plan.sites}
    for vertex in vertices:
        data = plan.flow.nodes[vertex]
        if data["site"] in planned and data["kind"] is not None:
            _rewrite(after, vertex, *_rewritten(plan, data["site"], data["kind"]))
    return Picture(f"{plan.model} {prefix}: {type(plan.config).__name__}", before, after)


def _layer(plan: PlanData, flow: Flow, layer: int) -> tuple[str, list[str]]:
    """The layer's name and its vertices, of the container that the plan's first sites lie in."""
    sites = {vertex: str(data["site"]) for vertex, data in flow.nodes(data=True)}
    places = layers_of(sorted(set(sites.values())))
    prefixes = {name: _prefix(name, index) for name, (index, _) in places.items()}
    planned = [s.name for s in plan.sites if s.name in places]
    wanted = next((prefixes[n] for n in planned if places[n][0] == layer % places[n][1]), None)
    if wanted is None:
        if not places and layer == 0:
            return "", list(flow)
        known = sorted({places[n][0] for n in planned})
        raise AdapterError(f"layer {layer}: the plan has no site in it; layers with sites: {known or 'none'}")
    return wanted, [v for v, site in sites.items() if prefixes.get(site) == wanted]


def _prefix(name: str, index: int) -> str:
    """The part of a name that ends with its layer's index."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(index), min(1, len(parts) - 1)) + 1])


def _drawing(flow: Flow, vertices: list[str], prefix: str) -> Drawing:
    """A part of the flow, with what leads into and out of it."""
    drawing: Drawing = nx.DiGraph()
    roles, inside = find_roles(flow), set(vertices)
    for vertex in vertices:
        data = flow.nodes[vertex]
        role, name = roles.get(vertex, ""), str(data["site"]).removeprefix(prefix).removeprefix(".")
        label = "\n".join([name, role]) if role else data["op"]
        drawing.add_node(vertex, label=label, fill=colour(role), site=name if role else "", new=False)
    places = layers_of(sorted({str(site) for _, site in flow.nodes(data="site")}))
    for before, after in dict.fromkeys((u, v) for u, v, _ in flow.edges):
        if before not in inside and after not in inside:
            continue
        ends = []
        for end, way in ((before, "from"), (after, "to")):
            if end not in inside:  # all of another layer is one vertex
                site = str(flow.nodes[end]["site"])
                near = _prefix(site, places[site][0]) if site in places else site or flow.nodes[end]["op"]
                end = f"{way} {near}"
                drawing.add_node(end, label=end, fill="#ffffff", site="", new=False)
            ends.append(end)
        drawing.add_edge(*ends)
    return drawing


def _rewritten(plan: PlanData, name: str, kind: Kind) -> tuple[Drawing, dict[str, str]]:
    """The site's rewrite, from the pass that makes it, on tensors that hold nothing; and what its ends stand for."""
    method = method_of(plan.config)
    site = method.plan(plan.config, name, kind)
    shapes = method.shapes(plan.config, site)
    adapter = SiteAdapter(site, _nowhere(shapes))
    adapter.share(SharedPart(_nowhere(method.shared(plan.config, {name: site}))))
    rewrite = method.rewrite("default", plan.config, adapter)
    assert isinstance(rewrite, Rewrite)
    with torch.device("meta"):
        stand_in = operation_of_kind(kind).stub(kind, kind.takes_bias)
    graph = InjectPass({"": [rewrite]})(trace_module(stand_in)).graph_module
    stands_for = {n.name: {"placeholder": "x", "output": "output"}.get(n.op, "base") for n in graph.graph.nodes
                  if n.op in ("placeholder", "output") or TARGET.has(n)}  # fmt: skip
    return drawing_of(graph, new=True), stands_for


def _nowhere(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _rewrite(drawing: Drawing, vertex: str, rewritten: Drawing, stands_for: dict[str, str]) -> None:
    """Put a site's rewrite in the place of its vertex; the vertex itself stays as its base."""
    site = drawing.nodes[vertex]["site"]
    for node, data in rewritten.nodes(data=True):
        if node not in stands_for:
            drawing.add_node(f"{vertex}:{node}", **{**data, "site": site, "new": True, "fill": "#ffffff"})
    sources, readers = list(drawing.predecessors(vertex)), list(drawing.successors(vertex))
    drawing.remove_edges_from([(source, vertex) for source in sources])
    drawing.remove_edges_from([(vertex, reader) for reader in readers])
    ends = {"x": sources, "output": readers, "base": [vertex]}
    for before, after in rewritten.edges:
        starts, stops = (ends[stands_for[n]] if n in stands_for else [f"{vertex}:{n}"] for n in (before, after))
        drawing.add_edges_from((u, v) for u in starts for v in stops)
