"""Match: any graph in; the same graph out, its target nodes annotated with site and kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import GraphPass, Report, RewriteResult, Skip, attribute, node_of
from fxpeft.passes.meta import READS, ROLE, SITE, TARGET
from fxpeft.passes.targets.kinds import Conv, Embedding, Kind, Linear
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.patterns import layers_of
from fxpeft.passes.targets.regex import limited
from fxpeft.passes.targets.terms import Pattern, Subject

aten = torch.ops.aten
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, torch.t}
_SWAPS = {aten.transpose.int, aten.permute.default, torch.transpose, torch.permute}
_TRANSPOSE_METHODS = {"t", "transpose", "permute"}
_ROOT = re.compile(r"^([LG]\[['\"]\w+['\"]\]|_export_root)(\.|$)")  # Dynamo's names for the root module


@dataclass(frozen=True)
class Target:
    """A node that a rewrite can take.

    Args:
        site: dotted name of the module that owns the weight; ``""`` is the root itself.
        kind: its linear algebra.
        input: index of the node's argument that carries the activations.
    """

    site: str
    kind: Kind
    input: int = 0


class Unsupported(Exception):
    """Looks like a target, but can't be rewritten; the message says why."""


def module_kind(module: nn.Module) -> Kind | None:
    """The kind of a module that is called as one node, or ``None``.

    Anything with ``in_features`` and ``out_features`` counts as linear, so that quantised linears
    of any library do.
    """
    if isinstance(module, nn.Embedding):
        return Embedding(module.num_embeddings, module.embedding_dim, _embedding_options(module))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Conv(
            module.in_channels, module.out_channels, tuple(module.kernel_size), module.stride,
            module.padding, module.dilation, module.groups,
        )  # fmt: skip
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return Linear(into, out) if isinstance(into, int) and isinstance(out, int) else None


def _embedding_options(module: nn.Embedding) -> tuple[tuple[str, Any], ...]:
    return (
        ("padding_idx", module.padding_idx), ("max_norm", module.max_norm), ("norm_type", module.norm_type),
        ("scale_grad_by_freq", module.scale_grad_by_freq), ("sparse", module.sparse),
    )  # fmt: skip


def read_target(graph_module: GraphModule, node: Node) -> Target | None:
    """Read one node: its target, ``None`` for any other operation.

    Raises:
        Unsupported: an operation of a known kind in a form that can't be rewritten.
    """
    target: Target | None
    if node.op == "call_module":
        kind = module_kind(graph_module.get_submodule(str(node.target)))
        target = None if kind is None else Target(str(node.target), kind)
    elif node.op == "call_function" and node.target in _READERS:
        target = _READERS[node.target](graph_module, node)
    else:
        return None
    if target is not None and len(node.args) <= target.input and (target.input or "input" not in node.kwargs):
        raise Unsupported("its input is passed under a name other than 'input'")
    return target


def _arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _weight(graph_module: GraphModule, value: Any) -> tuple[str, torch.Size, bool]:
    """Site, shape and whether the graph transposes it, of a weight operand."""
    node, transposed = node_of(value), False
    while node is not None and read_path(node) is None:
        known = node.target in _TRANSPOSES or node.target in _SWAPS
        if not known and not (node.op == "call_method" and node.target in _TRANSPOSE_METHODS):
            break
        node, transposed = node_of(node.args[0]), not transposed
    path = None if node is None else read_path(node)
    if node is None or path is None:
        raise Unsupported("its weight is computed in the graph, not read from a module")
    return path.rpartition(".")[0], value_of(graph_module, node).shape, transposed


def read_path(node: Node) -> str | None:
    """The dotted name of the attribute that a node reads or, as a placeholder, carries; ``None`` for any other."""
    path = READS.get(node)
    return str(node.target) if path is None and node.op == "get_attr" else path


def value_of(graph_module: GraphModule, node: Node) -> Any:
    """The attribute that a node reads, or the example that stands for a placeholder's."""
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target))
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def _owner(node: Node, site: str) -> str:
    """The calling module where the graph recorded it: with tied weights the weight's name is another's."""
    path = calling_module(node)
    # a module that reads the weight of one below it, without calling it, is not the weight's owner
    return site if not path or site.startswith(f"{path}.") else path


def calling_module(node: Node) -> str:
    """Dotted name of the innermost module whose forward made a node, as far as the graph recorded it."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return _ROOT.sub("", path)


def _read_linear(graph_module: GraphModule, node: Node) -> Target:
    site, shape, transposed = _weight(graph_module, _arg(node, 1, "weight"))
    if transposed or len(shape) != 2:
        raise Unsupported(f"its weight is not a plain [out, in] matrix: {tuple(shape)}")
    return Target(_owner(node, site), Linear(shape[1], shape[0]))


def _read_matmul(graph_module: GraphModule, node: Node) -> Target:
    first = 1 if node.target in (torch.addmm, aten.addmm.default) else 0
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise Unsupported("addmm with alpha or beta other than 1")
    site, shape, transposed = _weight(graph_module, _arg(node, first + 1, "mat2"))
    size = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return Target(_owner(node, site), Linear(*size), input=first)


def _read_embedding(graph_module: GraphModule, node: Node) -> Target:
    functional = node.target is F.embedding  # aten.embedding takes the weight first
    site, shape, _ = _weight(graph_module, _arg(node, int(functional), "weight"))
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    defaults = (None, None, 2.0, False, False)
    options: tuple[tuple[str, Any], ...] = ()
    if functional:
        read = zip(names, defaults, strict=True)
        options = tuple((n, _arg(node, 2 + i, n, d)) for i, (n, d) in enumerate(read))
    return Target(_owner(node, site), Embedding(shape[0], shape[1], options), input=0 if functional else 1)


def _read_conv(graph_module: GraphModule, node: Node) -> Target:
    site, shape, _ = _weight(graph_module, _arg(node, 1, "weight"))
    settings = [_arg(node, 3 + i, n, d) for i, (n, d) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1)))]
    groups: Any = node.args[8] if node.target is aten.convolution.default else _arg(node, 6, "groups", 1)
    if node.target is aten.convolution.default and node.args[6]:
        raise Unsupported("a transposed convolution")
    stride, padding, dilation = (tuple(s) if isinstance(s, list | tuple) else s for s in settings)
    kind = Conv(shape[1] * groups, shape[0], tuple(shape[2:]), stride, padding, dilation, groups)
    return Target(_owner(node, site), kind)


_READERS: dict[Any, Callable[[GraphModule, Node], Target]] = {
    F.linear: _read_linear,
    aten.linear.default: _read_linear,
    torch.addmm: _read_matmul,
    aten.addmm.default: _read_matmul,
    aten.mm.default: _read_matmul,
    F.embedding: _read_embedding,
    aten.embedding.default: _read_embedding,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _read_conv),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _read_conv),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _read_conv),
    aten.convolution.default: _read_conv,
}


# operation -> where its weight and its bias stand, and whether the weight is [in, out] there
_OPERANDS: dict[Any, tuple[tuple[int, str], tuple[int, str] | None, bool]] = {
    **dict.fromkeys((F.linear, aten.linear.default), ((1, "weight"), (2, "bias"), False)),
    **dict.fromkeys((torch.addmm, aten.addmm.default), ((2, "mat2"), (0, "input"), True)),
    aten.mm.default: ((1, "mat2"), None, True),
    F.embedding: ((1, "weight"), None, True),
    aten.embedding.default: ((0, "weight"), None, True),
    **{op: ((1, "weight"), (2, "bias"), False) for op, read in _READERS.items() if read is _read_conv},
}


def operands(graph_module: GraphModule, node: Node) -> tuple[Node | str, bool, Node | str | None]:
    """Weight and bias of a target: nodes of the graph or, where a module is called, dotted names.

    The flag in the middle says that the weight is ``[in, out]`` and has to be transposed to be what
    :meth:`Kind.apply` takes.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        return f"{node.target}.weight", isinstance(module, nn.Embedding), bias
    weight, second, flip = _OPERANDS[node.target]
    found = node_of(_arg(node, *weight))
    assert found is not None
    return found, flip, node_of(_arg(node, *second)) if second else None


def _subject(graph_module: GraphModule, node: Node, target: Target, layer: tuple[int, int] | None) -> Subject:
    """What a pattern can ask about a node: classes from the recorded calls, else from the called module."""
    stack = node.meta.get("nn_module_stack") or {}
    classes = [cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__ for _, cls in stack.values()]
    if node.op == "call_module":
        own = type(graph_module.get_submodule(str(node.target))).__mro__
        classes += [cls.__name__ for cls in own if issubclass(cls, nn.Module)]
    role = ROLE.get(node)
    return Subject(target.site, target.kind, tuple(dict.fromkeys(classes)), (role,) if role else (), layer)


def stored_weight(graph_module: GraphModule, node: Node) -> tuple[Node | str, bool]:
    """Where a target's weight is read, as in :func:`operands`, and whether it is stored ``[in, out]``."""
    found, flip, _ = operands(graph_module, node)
    while isinstance(found, Node) and found.op != "get_attr":
        found, flip = found.all_input_nodes[0], not flip  # the graph transposes it itself
    return found, flip


class MatchPass(GraphPass):
    """Annotate the target nodes that ``select`` takes: ``TARGET.of(node)`` becomes a :class:`Target`.

    Args:
        select: a :class:`NameSelector`; a pattern (:mod:`fxpeft.passes.targets.patterns`), whose roles are those
            that :class:`fxpeft.passes.RolePass` found before; or any predicate on a site's dotted name.
    """

    name = "match"

    def __init__(self, select: NameSelector | Pattern | Callable[[str], bool]) -> None:
        self.select = select

    @limited()
    def call(self, graph_module: GraphModule) -> RewriteResult:
        matched, skipped, modified = [], [], False
        found: list[tuple[Node, Target]] = []
        for node in graph_module.graph.nodes:
            if SITE.has(node):
                continue  # an adapter's own node
            try:
                target = read_target(graph_module, node)
            except Unsupported as why:
                skipped.append(Skip(node.name, str(why)))
                continue
            if target is not None:
                found.append((node, target))
        layers = layers_of([target.site for _, target in found])
        for node, target in found:
            if isinstance(self.select, NameSelector):
                reason = self.select.why_not(target.site)
            elif isinstance(self.select, Pattern):
                reason = self.select.why_not(_subject(graph_module, node, target, layers.get(target.site)))
            else:
                reason = None if self.select(target.site) else "not selected"
            if reason:
                skipped.append(Skip(target.site, reason))
                continue
            matched.append(target.site)
            modified |= TARGET.get(node) != target
            TARGET.set(node, target)
        size = len(graph_module.graph.nodes)
        report = Report(self.name, tuple(matched), tuple(skipped), size, size)
        return RewriteResult(graph_module, modified, report)
