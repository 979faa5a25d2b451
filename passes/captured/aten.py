"""Aten: a graph with an adapter's Python-level nodes in; out, the same in ATen operators with their values' shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, StrictMinMaxConstraint
from torch.fx.node import map_arg

from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, attribute
from fxpeft.passes.live.signature import Unknown, frozen, signature
from fxpeft.passes.meta import REDIRECT, REWRITE, SITE
from fxpeft.passes.rewrite.inject import rename
from fxpeft.passes.slots.slot import LEAST
from fxpeft.passes.torch_private import ConstantSource, FakeTensorMode, ValueRanges, pytree, symbolic_sizes

# decomposed, torch's matmul of a vector squeezes its product in place, and an inference IR knows no such operators
_OUT_OF_PLACE = {torch.ops.aten.squeeze_.dim: torch.ops.aten.squeeze.dim}


class AtenPass(GraphPass):
    """What torch.export's graphs consist of: operators of the ATen library, each with ``meta["val"]``.

    Args:
        fake_mode: the mode that the graph's values belong to.
        decompositions: operator -> its decomposition, for a program in inference IR; ``None``:
            training IR, in which composite operators stay.
        symbolic: operands whose first dimension may have any size from 2 to ``max_size``.
        sized: operands whose sizes are those of a value of the graph's.
    """

    name = "aten"

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        decompositions: Mapping[Any, Callable[..., Any]] | None,
        *,
        symbolic: Collection[torch.Tensor] = (),
        max_size: int = 0,
        sized: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        self.fake_mode = fake_mode
        self.decompositions = None if decompositions is None else dict(decompositions)
        self.fakes = {id(tensor): _symbolic(fake_mode, tensor, max_size) for tensor in symbolic}
        with fake_mode:
            own = [(id(t), torch.empty(like.shape, dtype=t.dtype, device=t.device)) for t, like in sized]
        self.fakes.update(own)
        self._traced: dict[Any, GraphModule] = {}  # what a node depends on -> its operators: sites are mostly alike

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self.fakes:
            self.fakes[id(tensor)] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        return self.fakes[id(tensor)]

    def call(self, graph_module: GraphModule) -> RewriteResult:
        before, matched = len(graph_module.graph.nodes), []
        names: dict[str, str] = {}
        bases = {n.name: n for n in graph_module.graph.nodes}
        for node in list(graph_module.graph.nodes):
            if "val" in node.meta or not (SITE.has(node) or REDIRECT.has(node)):
                continue
            matched.append(node.name)
            if node.op == "get_attr":
                node.meta["val"] = self._fake(attribute(graph_module, str(node.target)))
            else:
                names[node.name] = self._expand(graph_module, node, bases[SITE.of(node)]).name
        rename(graph_module.graph, names)
        report = Report(self.name, tuple(matched), (), before, len(graph_module.graph.nodes))
        return RewriteResult(graph_module, bool(matched), report)

    def _expand(self, gm: GraphModule, node: Node, base: Node) -> Node:
        """Put operators in the place of a node; returns the one that stands for it."""
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        places = [i for i, value in enumerate(flat) if isinstance(value, Node)]
        function = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target

        def run(*values: Any) -> Any:
            filled = list(flat)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            args, kwargs = pytree.tree_unflatten(filled, spec)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return function(*args, **kwargs)  # type: ignore[operator]

        values = [flat[i].meta["val"] for i in places]
        plain = [None if isinstance(value, Node) else value for value in flat]
        key = _key((node.op, function), (str(spec), *places), plain, values)
        traced = self._traced.get(key)
        if traced is None:
            trace = make_fx(
                run, self.decompositions, pre_dispatch=self.decompositions is None, _allow_non_fake_inputs=True
            )
            with symbolic_sizes():
                traced = trace(*values)
            if key is not None:
                self._traced[key] = traced
        with self.fake_mode, symbolic_sizes(), torch.no_grad():
            result = _inline(gm, node, traced, [flat[i] for i in places], base)
        if not isinstance(result, Node):
            raise PassError(f"site {base.name!r}: {node.format_node()} computes no tensor; write it without")
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        return result


def _key(operation: tuple[str, Any], form: tuple[Any, ...], plain: Sequence[Any], values: Sequence[Any]) -> Any:
    """What the operators of a node depend on: its operation, plain arguments and values; ``None``: that can't be told.

    Args:
        form: how the arguments are nested, and which of them are values.
    """
    op, function = operation
    try:
        if op == "call_module":
            function = signature(function), *(module.training for module in function.modules())
            if function[0] is None:
                return None
        known = [(id(value), _shape(value)) for value in values]
        same = [[first for first, _ in known].index(value) for value, _ in known]  # x * x is not x * y
        return op, function, form, frozen(plain), tuple(shape for _, shape in known), tuple(same)
    except Unknown:
        return None


def _shape(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, torch.Tensor):
        return (str(value), type(value)) if isinstance(value, torch.SymInt) else (frozen(value),)
    sizes = tuple(map(str, (*value.shape, *value.stride(), value.storage_offset())))
    return (
        value.dtype, value.device, value.layout, len(value.shape), sizes, value.requires_grad, value.is_conj(),
        value.is_neg(),
    )  # fmt: skip


def _inline(gm: GraphModule, node: Node, traced: GraphModule, inputs: list[Node], base: Node) -> Any:
    """Write a traced graph's nodes before ``node``; returns what stands for its output."""
    given = iter(inputs)
    made: dict[Node, Node] = {}
    result: Any = None
    for n in traced.graph.nodes:
        if n.op == "placeholder":
            made[n] = next(given)
        elif n.op == "output":
            result = made.get(n.args[0], n.args[0])
        elif n.op == "get_attr":
            raise PassError(f"site {base.name!r}: a rewrite that makes tensors of its own can't go into a program")
        elif n.users or n.is_impure():
            with gm.graph.inserting_before(node):
                new = made[n] = gm.graph.node_copy(n, made.__getitem__)
            new.target = _OUT_OF_PLACE.get(new.target, new.target)  # type: ignore[call-overload]
            new.meta = {"val": _value(new)} | {k: n.meta[k] for k in ("tensor_meta",) if k in n.meta}
            new.meta |= {k: base.meta[k] for k in ("nn_module_stack", "stack_trace") if k in base.meta}
            SITE.set(new, SITE.of(node))
            REWRITE.set(new, REWRITE.of(node))
            new.meta["torch_fn"] = (new.name, f"{type(new.target).__name__}.{new.target}")
    return result


def _value(node: Node) -> Any:
    """What an operator gives for its inputs' values: each node has its own, a view one in its base's memory."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    operator: Any = node.target
    given = {id(n.meta["val"]) for n in node.all_input_nodes}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if tensor.requires_grad or id(tensor) in given else tensor

    return pytree.tree_map_only(torch.Tensor, own, operator(*args, **kwargs))


def _symbolic(fake_mode: FakeTensorMode, tensor: torch.Tensor, most: int) -> torch.Tensor:
    """A fake of ``tensor`` with a first dimension between 2 and ``most``."""
    context: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, *(DimDynamic.STATIC for _ in tensor.shape[1:])],
        constraint_sizes=[
            StrictMinMaxConstraint(vr=ValueRanges(LEAST, most), warn_only=False), *(None for _ in tensor.shape[1:])
        ],
    )  # fmt: skip
    return fake_mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource("fxpeft_active_rank"))
