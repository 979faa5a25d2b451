"""Pictures: a graph before and after a rewrite, side by side, as SVG.

Graphviz draws them (through pydot) where its ``dot`` is installed, else matplotlib.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import networkx as nx
from torch import Tensor
from torch.fx import GraphModule, Node

from fxpeft.passes.base import PassError, attribute
from fxpeft.passes.meta import ROLE, SITE, TARGET
from fxpeft.passes.torch_private import OpOverload, schema_of

Drawing: TypeAlias = "nx.DiGraph[str]"
Engine = Literal["dot", "matplotlib"]

#: fill colours; a role takes its own, else its family's
COLOURS = {
    "attention": "#a9d2f3", "attention.key": "#bfe3ee", "attention.value": "#c9daf8", "attention.output": "#8fb8ea",
    "cross_attention": "#b5c7f7", "mlp": "#ffd8a8", "mlp.up": "#ffe8c2", "mlp.down": "#ffc078", "router": "#f7b2c4",
    "experts": "#fbd0dc", "lm_head": "#d9c2ec", "head": "#d9c2ec", "embedding": "#bfe8c9",
}  # fmt: skip
NEUTRAL, OLD, NEW = "#f1f3f5", "#868e96", "#c92a2a"
_CASTS = ("type_as", "to", "size", "getattr")


def colour(role: str) -> str:
    """The fill colour of a role; grey for none."""
    return COLOURS.get(role) or COLOURS.get(role.partition(".")[0], NEUTRAL)


class Seen(NamedTuple):
    """What a drawing shows of one node, as it was when it was looked at: passes change nodes in place.

    Args:
        key: its name; of a read, the path. label: its operation's name, or an input's; of a read, with the shape.
        inputs: the nodes that it takes. first: its first argument where that is a node.
    """

    node: Node
    op: str
    key: str
    label: str
    inputs: list[Node]
    first: Node | None
    role: str | None
    site: str | None
    made: bool


Sketch: TypeAlias = list[Seen]


def sketch(graph_module: GraphModule) -> Sketch:
    """All that a drawing of a graph needs, for little: most are never drawn."""
    seen = []
    for node in graph_module.graph.nodes:
        target, key, label = TARGET.get(node), node.name, _name(node)
        if node.op == "get_attr":
            key = str(node.target)
            label = _read(graph_module, key)
        first = node.args[0] if node.args else None
        seen.append(Seen(
            node, node.op, key, label, node.all_input_nodes, first if isinstance(first, Node) else None,
            ROLE.get(node), None if target is None else target.site, SITE.has(node),
        ))  # fmt: skip
    return seen


def drawing_of(graph_module: GraphModule | Sketch, *, new: bool = False) -> Drawing:
    """A graph's operations, each with what it reads from the module; casts are left out.

    Vertices have ``label``, ``fill``, ``site`` (empty outside of one) and ``new``: made by a rewrite.

    Args:
        graph_module: the graph, or what :func:`sketch` kept of it.
        new: show what a rewrite made.
    """
    seen = sketch(graph_module) if isinstance(graph_module, GraphModule) else graph_module
    drawing: Drawing = nx.DiGraph()
    by_node = {each.node: each for each in seen}
    stands_for: dict[Node, Node | None] = {}  # a node that isn't drawn is the one it takes its value from
    for each in seen:
        node = each.node
        if each.op == "get_attr":
            stands_for[node] = None
            continue
        inputs = [stands_for.get(n) for n in each.inputs]
        drawn = [n for n in dict.fromkeys(inputs) if n is not None]
        if each.label in _CASTS:
            stands_for[node] = drawn[0] if drawn else None
            continue
        if each.op in ("call_function", "call_method") and not drawn:
            stands_for[node] = None  # made of parameters alone, as a slot's window is
            continue
        stands_for[node] = node
        drawing.add_node(
            each.key,
            label="\n".join([each.label, *_reads(each, by_node, stands_for)]),
            fill=colour(each.role or "") if each.site is None or each.role is not None else COLOURS["attention"],
            site=each.site or "",
            new=each.made and new,
        )
        drawing.add_edges_from((by_node[n].key, each.key) for n in drawn)
    return drawing


def _name(node: Node) -> str:
    if node.op == "placeholder":
        return str(node.target)
    if node.op == "output":
        return "output"
    if isinstance(node.target, OpOverload):
        return str(schema_of(node.target).name).partition("::")[2]
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def _reads(each: Seen, by_node: Mapping[Node, Seen], drawn: Mapping[Node, Node | None]) -> list[str]:
    """What a node reads of the module, through casts and narrowings of it too."""
    reads: dict[str, str] = {}
    stack = [n for n in reversed(each.inputs) if drawn.get(n) is None]
    while stack:
        read = by_node[stack.pop()]
        if read.op == "get_attr":
            reads[read.key] = read.label
        elif read.first is not None:
            stack.append(read.first)
    return list(reads.values())


def _read(graph_module: GraphModule, path: str) -> str:
    try:
        value = attribute(graph_module, path)
    except AttributeError:
        value = None
    short = path.rpartition(".")[2]
    return f"{short} {list(value.shape)}" if isinstance(value, Tensor) and value.ndim else short


@dataclass(frozen=True)
class Picture:
    """A graph before and after a rewrite.

    Args:
        title: what it shows. before, after: drawings, as :func:`drawing_of` makes them.
    """

    title: str
    before: Drawing
    after: Drawing

    def svg(self, engine: Engine | None = None) -> str:
        """The picture as SVG.

        Args:
            engine: default: ``"dot"`` where it is installed, else ``"matplotlib"``.

        Raises:
            PassError: the engine is not installed.
        """
        return self._render("svg", engine).decode()

    def save(self, path: str | Path, engine: Engine | None = None) -> None:
        """Write an ``.svg``, ``.png`` or ``.pdf`` file."""
        path = Path(path)
        kind = path.suffix.removeprefix(".")
        if kind not in ("svg", "png", "pdf"):
            raise PassError(f"{path}: expected a name that ends in .svg, .png or .pdf")
        content = self._render(kind, engine)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(content)
        temporary.replace(path)

    def _repr_svg_(self) -> str:
        return self.svg()

    def _render(self, kind: str, engine: Engine | None) -> bytes:
        if engine is None:
            engine = "dot" if shutil.which("dot") and _has("pydot") else "matplotlib"
        if engine == "dot":
            return self._with_dot(kind)
        return self._with_matplotlib(kind)

    def _with_dot(self, kind: str) -> bytes:
        if not shutil.which("dot") or not _has("pydot"):
            raise PassError("drawing with dot needs graphviz and pydot: install graphviz, then pip install pydot")
        made: bytes = self.dot().create(format=kind)
        return made

    def dot(self) -> Any:
        """The picture as a ``pydot.Dot``."""
        import pydot

        font = {"fontname": "Helvetica", "fontsize": "10"}
        whole = pydot.Dot("picture", graph_type="digraph")
        whole.obj_dict["attributes"].update(
            label=_quoted(self.title), labelloc="t", nodesep="0.2", ranksep="0.3", fontname="Helvetica", fontsize="13"
        )
        for side, drawing in (("before", self.before), ("after", self.after)):
            cluster = _cluster(side, label=side, color='"#ced4da"', style="rounded", **font)
            rewritten = {d["site"] for _, d in drawing.nodes(data=True) if d["new"] and d["site"]}
            dashed = {"color": '"#e8a0a0"', "style": '"rounded,dashed"', "fontcolor": f'"{NEW}"', **font}
            sites = {s: _cluster(f"{side}_{i}", label=_quoted(s), **dashed) for i, s in enumerate(sorted(rewritten))}
            for vertex, data in drawing.nodes(data=True):
                node: Any = pydot.Node(f'"{side}:{vertex}"')
                node.obj_dict["attributes"].update(
                    label=_quoted(data["label"]), fillcolor=f'"{data["fill"]}"', shape="box", style='"rounded,filled"',
                    color=f'"{NEW if data["new"] else OLD}"', penwidth="1.6" if data["new"] else "0.8", height="0.3",
                    margin='"0.1,0.04"', **font,
                )  # fmt: skip
                sites.get(data["site"], cluster).add_node(node)
            for site in sites.values():
                cluster.add_subgraph(site)
            for before, after in drawing.edges:
                ends = (f'"{side}:{before}"', f'"{side}:{after}"')
                cluster.add_edge(pydot.Edge(*ends, color='"#495057"', arrowsize="0.6"))
            whole.add_subgraph(cluster)
        return whole

    def _with_matplotlib(self, kind: str) -> bytes:
        if not _has("matplotlib"):
            raise PassError("drawing needs graphviz and pydot, or matplotlib: pip install matplotlib")
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        places = [_places(drawing) for drawing in (self.before, self.after)]
        columns = [[x for x, _ in place.values()] or [0.0] for place in places]
        wide = [max(xs) - min(xs) + 1 for xs in columns]
        high = max(len({y for _, y in place.values()}) for place in places)
        figure = Figure(figsize=(1.3 * sum(wide) + 1, 0.55 * high + 1))
        FigureCanvasAgg(figure)
        figure.suptitle(self.title, fontsize=11)
        axes = figure.subplots(1, 2, width_ratios=wide, squeeze=True)
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.8 / (0.55 * high + 1), wspace=0.05)
        sides = (("before", self.before), ("after", self.after))
        for axis, place, xs, (side, drawing) in zip(axes, places, columns, sides, strict=True):
            axis.set_title(side, fontsize=9)
            axis.set_axis_off()
            axis.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
            axis.set_ylim(0.5 - high, 0.5)
            for before, after in drawing.edges:
                (x, y), (z, w) = place[before], place[after]
                bend = 0.0 if y - w < 1.5 else 0.3 if abs(x - z) > 0.6 else 0.95  # around what lies between
                way = f"arc3,rad={bend}"
                style = {"arrowstyle": "-|>", "color": OLD, "linewidth": 0.8, "connectionstyle": way}
                arrow = {**style, "shrinkA": 9, "shrinkB": 9}
                axis.annotate("", place[after], place[before], arrowprops=arrow)
            for vertex, data in drawing.nodes(data=True):
                edge, line = (NEW, 1.2) if data["new"] else (OLD, 0.6)
                box = {"boxstyle": "round,pad=0.35", "facecolor": data["fill"], "edgecolor": edge, "linewidth": line}
                axis.text(*place[vertex], data["label"], fontsize=6, ha="center", va="center", bbox=box)
        out = io.BytesIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
            figure.savefig(out, format=kind, bbox_inches="tight", dpi=150)
        return out.getvalue()


def _places(drawing: Drawing) -> dict[str, tuple[float, float]]:
    """Each vertex below those it reads, near the middle of them."""
    place: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(nx.topological_generations(drawing)):
        above = {v: [place[p][0] for p in drawing.predecessors(v)] for v in row}
        wished = {v: sum(xs) / len(xs) if xs else 0.0 for v, xs in above.items()}
        ordered = sorted(row, key=lambda v: wished[v])
        middle = sum(wished.values()) / len(row)
        for at, vertex in enumerate(ordered):
            place[vertex] = (middle + at - (len(row) - 1) / 2, -float(depth))
    return place


def _cluster(name: str, **attributes: str) -> Any:
    import pydot

    cluster: Any = pydot.Cluster(name)
    cluster.obj_dict["attributes"].update(attributes)
    return cluster


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
