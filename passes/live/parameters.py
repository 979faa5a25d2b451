"""Parameters as targets: a graph that is one call of a module in; out, the module reads other values as its own.

Some weights are read by a forward that no pass can look into: experts held as one parameter, multiplied in a
loop or by a grouped kernel, whichever the model's config names. Such a module is called as it is, on a
:class:`Reading` of itself in which the parameter is ``weight + update``: computed once a call, or, for a stack that is
trained, left as two (:mod:`~fxpeft.passes.live.split`). The module
keeps its parameters, so ``state_dict``, ``named_parameters`` and ``.to()`` don't notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.nn.utils.parametrize import is_parametrized

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, TracedModule, join
from fxpeft.passes.live.bind import bind_source
from fxpeft.passes.live.instance import base_class, given_forward
from fxpeft.passes.live.split import given
from fxpeft.passes.meta import CALL, OPERAND
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.recent import Recent
from fxpeft.passes.rewrite.feed import LEAF
from fxpeft.passes.rewrite.inject import Rewrite, get_attr, install
from fxpeft.passes.slots.slot import ActiveRank, Slot
from fxpeft.passes.source import graph_source
from fxpeft.passes.targets.operations.parameter import ParameterKind
from fxpeft.passes.targets.operations.parameter import add_product as add_product  # 0.1.0's pickles name it here

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_sources: Recent[tuple[Any, ...], str] = Recent()


def parametrized(module: nn.Module) -> list[str]:
    """Names of the parameters in whose place ``torch.nn.utils.parametrize`` computes a value when they are read."""
    if not is_parametrized(module):
        return []
    every: Any = module.parametrizations
    return [leaf for leaf, steps in every.items() if next(steps.parameters(recurse=False), None) is not None]


def parameter_value(module: nn.Module, leaf: str) -> Tensor | None:
    """What a forward reads as its module's parameter: that, or what a parametrization computes; or ``None``."""
    if leaf in parametrized(module):
        computed: Tensor = getattr(module, leaf)
        return computed.detach()
    return module._parameters.get(leaf)


def parameter_kind(module: nn.Module, leaf: str) -> ParameterKind:
    """The kind of a module's own parameter; a module with ``is_transposed`` stores ``[experts, in, out]``.

    An update is added to what a parametrization computes, as in PEFT.

    Raises:
        PassError: it is no plain floating-point matrix or stack of matrices.
    """
    parameter = parameter_value(module, leaf)
    if parameter is None:
        raise PassError(f"{base_class(module).__name__} has no parameter {leaf!r} of its own")
    shape = tuple(parameter.shape)
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.dtype not in FLOATS or len(shape) not in (2, 3):
        found = f"{type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')} {list(shape)}"
        raise PassError(f"expected a floating-point parameter [out, in] or [experts, out, in], found a {found}")
    if len(shape) == 2:
        return ParameterKind(shape[1], shape[0], leaf)
    transposed = bool(getattr(module, "is_transposed", False))
    first, second = shape[1:] if transposed else shape[:0:-1]
    return ParameterKind(first, second, leaf, shape[0], transposed)


class Reading:
    """A module as its own forward sees it, with other values in the place of some parameters.

    All else is the module's: what is written goes there, and methods run on the reading.
    """

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        found = getattr(self._module, name)
        if isinstance(found, MethodType) and found.__self__ is self._module:
            return partial(found.__func__, self)
        return found

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance and super() ask this where the type doesn't fit; Dynamo does before there is a module
        module = vars(self).get("_module")
        return Reading if module is None else type(module)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


def call_reading(
    forward: MethodType, values: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a module's forward on a :class:`Reading` of it."""
    module: nn.Module = forward.__self__  # type: ignore[assignment]
    read = {leaf: given(module, value) for leaf, value in values.items()}
    return forward.__func__(Reading(module, read), *args, **kwargs)


class ReadPass(GraphPass):
    """Let the one call of a graph (see :func:`read_graph`) read updated parameters.

    Args:
        rewrites: parameter's name -> its kind, its value and its rewrites, each
            ``function(kind, weight, **operands) -> weight``.

    Raises:
        PassError: the graph has no such call.
    """

    name = "read"

    def __init__(self, rewrites: Mapping[str, tuple[ParameterKind, Tensor, Sequence[Rewrite]]]) -> None:
        self.rewrites = rewrites

    def call(self, graph_module: GraphModule) -> RewriteResult:
        graph, tracer = graph_module.graph, GraphAppendingTracer(graph_module.graph)
        before = len(graph.nodes)
        call = next((n for n in graph.nodes if CALL.has(n)), None)
        if call is None:
            raise PassError("expected a graph that is one call of a module, found none; make it with read_graph")
        if CALL.of(call):
            return RewriteResult(graph_module, False, Report(self.name, (), (), before, before))
        values: dict[str, Any] = {}
        with graph.inserting_before(call):
            for leaf, (kind, weight, rewrites) in self.rewrites.items():
                install(graph_module, leaf, weight)
                value = Proxy(get_attr(graph, leaf), tracer)
                for rewrite in rewrites:
                    operands = {}
                    for path, operand in rewrite.operands.items():
                        install(graph_module, join(rewrite.container, path), operand)
                        read = get_attr(graph, join(rewrite.container, path))
                        OPERAND.set(read, True)
                        operands[path.rpartition(".")[2]] = Proxy(read, tracer)
                    value = rewrite.function(kind, value, **operands)
                values[leaf] = value.node
        call.args = (call.args[0], values, *call.args[2:])
        CALL.set(call, tuple(r.name for *_, rewrites in self.rewrites.values() for r in rewrites))
        return RewriteResult(graph_module, True, Report(self.name, tuple(values), (), before, len(graph.nodes)))


def read_graph() -> GraphModule:
    """The graph that does nothing but call a module's own forward on a reading of it."""
    graph = Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    call = graph.call_function(call_reading, (get_attr(graph, LEAF), {}, args, kwargs))
    CALL.set(call, ())
    graph.output(call)
    root = nn.Module()
    root.add_module(LEAF, nn.Module())  # stands for what the code finds in the live module
    return TracedModule(root, graph)


def read_module(
    module: nn.Module, rewrites: Mapping[str, Sequence[Rewrite]], *, name: str, dump: str | None = None
) -> None:
    """Let a module's forward read rewritten parameters, and bind the result.

    The operands have to be reachable from the module itself at ``container.path``.

    Args:
        rewrites: parameter's name -> its rewrites, in order; see :class:`ReadPass`.
        name: the module's dotted name, for messages.

    Raises:
        PassError: a parameter is of no kind that can be updated, or the forward can't be given other
            values; the module is unchanged then.
    """
    try:
        if given_forward(module) is not None:
            raise PassError("somebody replaced this instance's forward, so it can't be given another parameter to read")
        kinds = {leaf: parameter_kind(module, leaf) for leaf in rewrites}
        key = tuple((leaf, kinds[leaf], *(r.signature() for r in own)) for leaf, own in rewrites.items())
        source = _sources.recent(key) if dump is None else None
        if source is None:
            given = {leaf: (kinds[leaf], parameter_value(module, leaf), own) for leaf, own in rewrites.items()}
            source = graph_source(Pipeline([ReadPass(given)], dump=dump)(read_graph()).graph)  # type: ignore[arg-type]
            _sources[key] = source
    except PassError as error:
        raise PassError(f"{name}: {error}") from None
    bind_source(module, source)


def slot_weight(
    kind: ParameterKind, weight: Tensor, *, a: Tensor, b: Tensor, d: Tensor, rank: ActiveRank | None = None
) -> Tensor:
    """The serving subgraph of a parameter: ``weight + sum over ranks of d A B``.

    ``a``: [max_rank, experts, in], ``b``: [max_rank, experts, out], ``d``: [max_rank].
    """
    if rank is not None:
        r = rank.carrier.size(0)
        a, b, d = a.narrow(0, 0, r), b.narrow(0, 0, r), d.narrow(0, 0, r)
    return kind.updated(weight, scaled(a, d.view(-1, 1, 1)), b)


def scaled(a: Tensor, scale: Tensor) -> Tensor:
    """A times its scale, rounded once."""
    return (a * scale).type_as(a)


def slot_rewrite(slot: Slot, leaf: str) -> Rewrite:
    """The rewrite of a parameter whose slot is reachable at ``slot.<leaf>``."""
    operands: dict[str, Any] = {f"{leaf}.{name}": slot._buffers[name] for name in ("a", "b", "d")}
    if slot.rank is not None:
        operands[f"{leaf}.rank"] = slot.rank
    function: Callable[..., Tensor] = slot_weight
    return Rewrite("slot", function, operands, container="slot")
