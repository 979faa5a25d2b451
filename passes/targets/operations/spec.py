"""What makes an operation a target: one record, of which each file beside this one has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Node

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.reading import Weight


class Places(NamedTuple):
    """Where a call takes what: an argument's place, and its name.

    ``flip`` says that the weight is ``[in, out]`` there and has to be transposed to be what :meth:`Kind.apply` takes.
    """

    input: int = 0
    weight: tuple[int, str] = (1, "weight")
    bias: tuple[int, str] | None = (2, "bias")
    flip: bool = False


@dataclass(frozen=True)
class OpSpec:
    """An operation that a rewrite can take: how it is found, read, stood in for and written down.

    Args:
        kind: its linear algebra, and what it can do; a manifest names it by the kind's ``name``.
        calls: function or ATen overload -> where its operands are.
        read: the kind of such a call with its weight; ``Unsupported`` for a form that can't be rewritten.
        modules: classes whose forward is nothing but the operation, where a graph calls the module as one node.
        of_module: the kind of a module that is called as one node, also of other classes; ``None``: it is none.
        stub: a module that stands for a target of a kind, with or without a bias, wherever there is no model.
        flip: ``weight`` of these modules is ``[in, out]``.
        names: what its kinds are called, where there are several.
    """

    kind: type[Kind]
    calls: Mapping[Any, Places]
    read: Callable[[Node, Weight], Kind]
    stub: Callable[[Kind, bool], nn.Module]
    modules: tuple[type[nn.Module], ...] = ()
    of_module: Callable[[nn.Module], Kind | None] = lambda module: None
    flip: bool = False
    names: tuple[str, ...] = ()
