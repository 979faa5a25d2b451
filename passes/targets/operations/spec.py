"""What makes an operation a target: one record, of which each file beside this one has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule, Node

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.reading import Weight
from fxpeft.passes.torch_private import OpOverload


class Places(NamedTuple):
    """Where a call takes what: an argument's place, and its name.

    Args:
        flip: the weight is ``[in, out]`` there and has to be transposed to be what :meth:`Kind.apply` takes.
        picks: the weight is a stack, of which some may be picked by their numbers.
    """

    input: int = 0
    weight: tuple[int, str] = (1, "weight")
    bias: tuple[int, str] | None = (2, "bias")
    flip: bool = False
    picks: bool = False


def _as_it_is(kind: Kind, node: Node, wrap: Callable[[Node], Any]) -> Kind:
    return kind


@dataclass(frozen=True)
class OpSpec:
    """An operation that a rewrite can take: how it is found, read, stood in for and written down.

    Args:
        kind: its linear algebra, and what it can do; a manifest names it by the kind's ``name``.
        calls: function, ATen overload or an overload's name -> where its operands are, or what finds that out:
            ``None`` for a call that applies no weight.
        read: the kind of such a call with its weight; ``Unsupported`` for a form that can't be rewritten.
        modules: classes whose forward is nothing but the operation, where a graph calls the module as one node.
        of_module: the kind of a module that is called as one node, also of other classes; ``None``: it is none.
        stub: a module that stands for a target of a kind, with or without a bias, wherever there is no model.
        flip: ``weight`` of these modules is ``[in, out]``.
        names: what its kinds are called, where there are several.
        bind: the kind with what else its algebra takes of the graph around a call, each node wrapped.
    """

    kind: type[Kind]
    calls: Mapping[Any, Places | Callable[[GraphModule, Node], Places | None]]
    read: Callable[[Node, Weight], Kind]
    stub: Callable[[Kind, bool], nn.Module]
    modules: tuple[type[nn.Module], ...] = ()
    of_module: Callable[[nn.Module], Kind | None] = lambda module: None
    flip: bool = False
    names: tuple[str, ...] = ()
    bind: Callable[[Kind, Node, Callable[[Node], Any]], Kind] = _as_it_is

    def has(self, call: Any) -> bool:
        """Whether a function or overload is this operation."""
        return call in self.calls or (isinstance(call, OpOverload) and str(call) in self.calls)

    def places(self, graph_module: GraphModule, node: Node) -> Places | None:
        """Where a call of the operation takes what; ``None``: it applies no weight.

        Raises:
            Unsupported: it does, in a form that can't be rewritten.
        """
        found = self.calls[node.target if node.target in self.calls else str(node.target)]
        return found if isinstance(found, Places) else found(graph_module, node)
