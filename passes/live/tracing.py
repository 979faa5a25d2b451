"""One module's own graph, traced without touching anything but a stand-in of it.

``torch.fx.Tracer.trace`` patches ``nn.Module`` for the whole process while it runs, so that a forward in
another thread would be traced too, and compiled code refuses to run. Here a stand-in of the module gives
proxies for its tensors, and nothing else notices. No traced graph is compiled: what runs is the source
that is generated from the rewritten one.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Graph, GraphModule, Node, Proxy

from fxpeft.passes.base import PassError, TracedModule, attribute, join
from fxpeft.passes.container import Container
from fxpeft.passes.live.instance import DIFFUSERS, base_class, given_forward, named_forward
from fxpeft.passes.live.signature import signature
from fxpeft.passes.meta import TARGET, Located
from fxpeft.passes.pipeline import graph_text
from fxpeft.passes.recent import Recent
from fxpeft.passes.replaced import one_node_each
from fxpeft.passes.rewrite.feed import LEAF
from fxpeft.passes.source import check_plain
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.match import MatchPass, Target, module_kind, read_target, stored_weight
from fxpeft.passes.targets.operations.registry import kind_names, operation_of
from fxpeft.passes.targets.reading import Unsupported

_kinds: Recent[tuple[Any, ...], Kind | str] = Recent()  # or why it is none
_weights: Recent[tuple[Any, ...], tuple[str, bool]] = Recent()  # a weight's name, and whether it is stored [in, out]
_RESHAPES = ("view", "reshape", "flatten")


class _Tracer(fx.Tracer):
    """Traces a stand-in; a tensor in the graph is a parameter, a buffer or a tensor attribute of the module."""

    def graph_of(self, module: nn.Module, *, training: bool) -> Graph:
        self.graph = Graph()
        self.module_stack.clear()
        self.tensors: dict[int, str] = {}
        self.proxies: dict[str, Proxy] = {}
        self.training = training
        self.root = self.stand_in(module, "")
        forward = type(self.root).forward
        function, arguments = self.create_args_for_root(forward, True)
        result, returns = function(*arguments), inspect.get_annotations(inspect.unwrap(forward)).get("return")
        self.create_node("output", "output", (self.create_arg(result),), {}, type_expr=returns)
        return self.graph

    def create_arg(self, a: Any) -> Any:
        """A value in the graph; a tensor that is none of the module's was computed while tracing."""
        if isinstance(a, Tensor | nn.Module) and not isinstance(a, Proxy):
            if id(a) not in self.tensors:
                raise PassError("its forward computes a tensor that doesn't depend on its inputs")
            return self.read(self.tensors[id(a)]).node
        return super().create_arg(a)

    def read(self, path: str) -> Proxy:
        """The read of an attribute, made once."""
        if path not in self.proxies:
            self.proxies[path] = self.create_proxy("get_attr", path, (), {})
        return self.proxies[path]

    def stand_in(self, module: nn.Module, path: str) -> nn.Module:
        """An instance of the module's own class: its tensors are proxies; no hooks, no instance forward.

        Its other attributes are copies: a forward that is traced may write to them, as that of
        bitsandbytes' Linear8bitLt does to its state, and proxies must not get into the module.
        """
        cls, held = base_class(module), {**module._parameters, **module._buffers}
        members: dict[str, Any] = {"__module__": cls.__module__}

        def read_attribute(self_: nn.Module, name: str) -> Any:
            if held.get(name) is not None:
                return self.read(join(path, name))
            return cls.__getattr__(self_, name)

        members["__getattr__"] = read_attribute
        if path and self.is_leaf_module(module, path):
            members["__call__"] = lambda self_, *args, **kwargs: self.create_proxy("call_module", path, args, kwargs)
        made: nn.Module = cls.__new__(type(cls.__name__, (cls,), members))
        vars(made).update({name: _copied(value) for name, value in vars(module).items()})
        for name in ("forward", "_old_forward", "_hf_hook", DIFFUSERS):
            vars(made).pop(name, None)
        for name, value in (*vars(module).items(), *held.items()):
            if isinstance(value, Tensor):
                self.tensors[id(value)] = join(path, name)
        vars(made)["training"] = self.training
        vars(made)["_modules"] = {
            name: None if child is None else self.stand_in(child, join(path, name))
            for name, child in module._modules.items()
            if not isinstance(child, Container)
        }
        return made


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor | nn.Module) or callable(value):
        return value
    try:
        return copy.copy(value)
    except TypeError:  # it can't be copied
        return value


def trace_module(module: nn.Module, *, rows: bool = False) -> GraphModule:
    """The graph of one module's own forward, annotated with exactly one target.

    Where torch.fx can't trace the forward, or what it finds is not one plain target whose graph is
    the same in training and evaluation, the graph is one leaf call of the module.

    Args:
        rows: the target has to see rows as the module does: where that flattens its input, it is called as a leaf.

    Raises:
        PassError: the module is of no kind that a rewrite knows.
    """
    traced = _trace_inside(module)
    if traced is not None and not (rows and _flattens(traced)):
        return traced
    kind = module_kind(module) if traced is None else target_of(traced).kind
    if kind is None:
        known = f"{', '.join(kind_names())} or a module with in_features and out_features"
        raise PassError(f"{base_class(module).__name__} is no kind of target: expected {known}")
    return _leaf_graph(module, kind)


def _flattens(traced: GraphModule) -> bool:
    """Whether a module's target sees another shape than the module does."""
    node = next(node for node in traced.graph.nodes if TARGET.has(node))
    return any(str(source.target).rpartition(".")[2] in _RESHAPES for source in node.all_input_nodes)


def target_of(graph_module: GraphModule) -> Located:
    """The one annotated target of a leaf graph."""
    return next(TARGET.of(node) for node in graph_module.graph.nodes if TARGET.has(node))


def kind_of(module: nn.Module) -> Kind:
    """The :class:`Kind` of a module, read off its graph.

    Raises:
        PassError: as :func:`trace_module`.
    """
    key = signature(module)
    found = _kinds.recent(key) if key else None
    if found is None:
        try:
            found = target_of(trace_module(module)).kind
        except PassError as error:
            found = str(error)
        if key:
            _kinds[key] = found
    if isinstance(found, str):
        raise PassError(found)
    return found


def base_weight(module: nn.Module) -> Tensor:
    """A target's own weight as a view ``[out, in, ...]``, however it is stored.

    Raises:
        PassError: the module is no target, or its weight is not plain: quantised, for instance.
    """
    key = signature(module)
    where = _weights.recent(key) if key else None
    if where is None:
        traced = trace_module(module)
        node = next(node for node in traced.graph.nodes if TARGET.has(node))
        found, flip = stored_weight(traced, node)
        where = str(found if isinstance(found, str) else found.target).removeprefix(f"{LEAF}."), flip
        if key:
            _weights[key] = where
    weight = attribute(module, where[0])
    view: Tensor = weight.t() if where[1] else weight
    if type(weight) not in (Tensor, nn.Parameter) or tuple(view.shape[:1]) != (kind_of(module).out_features,):
        found_type = f"{base_class(module).__name__}.weight is a {type(weight).__name__}"
        raise PassError(f"expected a plain tensor as weight: {found_type} {tuple(weight.shape)}")
    return view.detach()


def _trace_inside(module: nn.Module) -> GraphModule | None:
    """The module's own graph with its one target annotated, or ``None``."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None  # inside, the convolution reads the padded input; PEFT's A pads its own with zeros
    try:
        traced = trace_any(module)
        found = [t for n in traced.graph.nodes if not _reads_stack(n) and (t := read_target(traced, n))]
    except (PassError, Unsupported):
        return None
    if [t.site for t in found] != [""]:
        return None
    MatchPass(lambda site: site == "")(traced)
    return traced


def _reads_stack(node: Node) -> bool:
    """Whether a node's target would be a parameter: one of a live module is updated where that reads it."""
    operation = operation_of(node.target)
    return operation is not None and operation.kind.is_parameter


def trace_any(module: nn.Module) -> GraphModule:
    """The module's own graph, the same in training and evaluation.

    Raises:
        PassError: there is none.
    """
    if given_forward(module) is not None:
        raise PassError("somebody replaced this instance's forward, so it can only be called, not looked into")
    traced = []
    for training in (module.training, not module.training):
        try:
            with one_node_each():
                traced.append(TracedModule(module, _Tracer().graph_of(module, training=training)))
        except Exception as error:  # noqa: BLE001 - whatever a forward raises on proxies: it can't be traced
            raise PassError(f"torch.fx can't trace {base_class(module).__name__}.forward: {error}") from None
    if graph_text(traced[0]) != graph_text(traced[1]):
        raise PassError(f"{base_class(module).__name__}.forward depends on training mode")
    for node in traced[0].graph.nodes:
        if node.op in ("get_attr", "call_module"):
            check_plain(str(node.target))
    return traced[0]


def _leaf_graph(module: nn.Module, kind: Kind) -> GraphModule:
    root = nn.Module()
    root.add_module(LEAF, module)
    graph = fx.Graph()
    inputs = []
    for p in inspect.signature(named_forward(module)).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        default = () if p.default is p.empty else (p.default,)
        inputs.append(graph.placeholder(p.name, None, *default))
    if not inputs:
        inputs.append(graph.placeholder("input"))
    call = graph.call_module(LEAF, tuple(inputs))
    graph.output(call)
    traced = TracedModule(root, graph)
    TARGET.set(call, Target("", kind))
    return traced
