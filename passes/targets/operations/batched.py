"""Products with a stack of matrices, one for each expert: ``bmm`` and grouped products in a captured program.

The forward of a module that holds its experts as one parameter is in the graph as products with that parameter, so
an update is added to what these compute, at the cost of its ranks, where a live module is given another weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import PassError, node_of, tensor_of
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node
from fxpeft.passes.targets.operations.parameter import ParameterKind
from fxpeft.passes.targets.operations.spec import OpSpec, Places
from fxpeft.passes.targets.reading import Unsupported, Weight, argument, read_path, value_of, view_of

S = TypeVar("S", bound="Batched")

aten = torch.ops.aten
_RIGHT, _LEFT = Places(bias=None, picks=True), Places(input=1, weight=(0, "input"), bias=None, picks=True)


@dataclass(frozen=True)
class Batched(ParameterKind):
    """A batch ``[batch, tokens, in]`` times a stack ``[experts, in, out]``, or a stack times ``[batch, in, tokens]``.

    Where ``picks`` says which, entry by entry, the batch is as long as that, else there is one entry for each expert.

    Args:
        last: the input meets the last dimension of the stack as it is stored.
        left: the stack is the product's left side.
        picks: while a graph is rewritten, the numbers of the experts that are used.

    ``in_features`` is what A has. That is the input's side, but where a module stores ``[experts, in, out]`` without
    saying so (``is_transposed``): there PEFT has A at the outputs.
    """

    last: bool = True
    left: bool = False
    picks: Any = None

    updates_weight = False

    @property
    def at_input(self) -> bool:
        """Whether A meets the input."""
        return self.last != self.transposed

    def laid_out(self: S, transposed: bool) -> S:
        """The same with A at the stack's side that PEFT has it at where a module says ``is_transposed`` or not."""
        if transposed == self.transposed:
            return self
        return replace(self, in_features=self.out_features, out_features=self.in_features, transposed=transposed)

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """``[batch, tokens, in] -> [batch, tokens, rank]``, with the stack on the left ``[batch, rank, tokens]``."""
        return self.reduce_rows(x, self.ranks(a))

    def reduce_rows(self, x: Tensor, a: Tensor) -> Tensor:
        a, x = self._picked(a), x.type_as(a)
        return torch.bmm(a.transpose(0, 1), x) if self.left else torch.bmm(x, a.permute(1, 2, 0))

    def scale(self, h: Tensor, d: Tensor) -> Tensor:
        return (h * self.per_output(d)).type_as(h)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return self.expand_rows(h, self.rows(b))

    def expand_rows(self, h: Tensor, b: Tensor) -> Tensor:
        b = self._picked(b)
        return torch.bmm(b.permute(1, 2, 0), h) if self.left else torch.bmm(h, b.transpose(0, 1))

    def per_output(self, c: Tensor) -> Tensor:
        return c.view(-1, 1) if self.left else c

    def update(self, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        near, far = self._ends(self.ranks(a), self.rows(b))
        return self.expand_rows(self.scale(self.reduce_rows(x, near), scale), far)

    def update_ranks(
        self, x: Tensor, a: Tensor, b: Tensor, d: Tensor, *, narrowed: bool, masked: bool = True
    ) -> Tensor:
        return super().update_ranks(x, *self._ends(a, b), d, narrowed=True)

    def _ends(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factor that meets the input, and the other one."""
        return (a, b) if self.at_input else (b, a)

    def _picked(self, factor: Tensor) -> Tensor:
        return factor if self.picks is None else factor.index_select(1, self.picks)


@dataclass(frozen=True)
class Grouped(Batched):
    """Rows ``[tokens, in]``, sorted by expert, times a stack; ``picks`` are the ends of the experts' rows.

    Args:
        product: while a graph is rewritten, the operation itself, which the factors are applied with too, in the
            input's dtype: kernels of grouped products take no other.
    """

    product: Callable[..., Any] | None = None

    def reduce_rows(self, x: Tensor, a: Tensor) -> Tensor:
        return self._product(x, a.permute(1, 2, 0))

    def expand_rows(self, h: Tensor, b: Tensor) -> Tensor:
        if self.product is aten._grouped_mm.default:
            h, b = aligned(h, -1), aligned(b.type_as(h), 0)
        return self._product(h, b.transpose(0, 1))

    def _product(self, x: Tensor, stack: Tensor) -> Tensor:
        assert self.product is not None
        out: Tensor = self.product(x, stack.type_as(x), offs=self.picks)
        return out


@one_node
def aligned(x: Tensor, ranks: int) -> Tensor:
    """Zeros after the ranks, along that dimension: torch's grouped product takes rows of a multiple of 16 bytes only.

    Raises:
        PassError: the number of ranks is symbolic.
    """
    missing = -x.shape[ranks] % (16 // x.element_size())
    if not isinstance(missing, int):
        raise PassError(
            "a number of ranks that changes from call to call is nothing for torch's grouped product of experts, whose "
            "rows are multiples of 16 bytes; use rank='static', or model.set_experts_implementation('batched_mm') first"
        )
    return F.pad(x, [0, 0] * (x.ndim - 1 if ranks == 0 else 0) + [0, missing])


def _is_stack(graph_module: GraphModule, operand: Any) -> bool:
    node = view_of(operand).node
    return node is not None and read_path(node) is not None and getattr(value_of(graph_module, node), "ndim", 0) == 3


def _places(graph_module: GraphModule, node: Node) -> Places | None:
    """On which side of a product the stack is; there is none in a product of two inputs, as of queries and keys."""
    left, right = argument(node, (0, "input")), argument(node, (1, "mat2"))
    if _is_stack(graph_module, right):
        return _RIGHT._replace(weight=(1, "mat2"))
    return _LEFT if _is_stack(graph_module, left) else None


def _places_of_matmul(graph_module: GraphModule, node: Node) -> Places | None:
    places = _places(graph_module, node)
    if places is None:
        return None
    source, stack = node_of(node.args[places.input]), view_of(argument(node, places.weight))
    value = None if source is None else tensor_of(source)
    assert stack.node is not None
    batch = value_of(graph_module, stack.node).shape[0]
    if value is None or value.ndim != 3 or (stack.picks is None and value.shape[0] != batch):
        raise Unsupported("its input is not known to be one batch entry for each matrix of the stack; use torch.bmm")
    return places


def _read(node: Node, weight: Weight) -> Batched:
    if weight.picks is not None:
        picks = tensor_of(weight.picks)
        # without a value: bmm takes a stack, so they are one list
        if picks is not None and (picks.ndim != 1 or picks.dtype not in (torch.int32, torch.int64)):
            raise Unsupported("which of its stack's matrices it takes is no one list of numbers")
    left = view_of(argument(node, (0, "input"))).node is not None and _path_of(node.args[0]) == weight.path
    return _kind(Batched, weight, left)


def _read_grouped(node: Node, weight: Weight) -> Grouped:
    if weight.picks is not None:
        raise Unsupported("a grouped product with a part of a stack")
    return _kind(Grouped, weight, False)


def _path_of(operand: Any) -> str | None:
    node = view_of(operand).node
    return None if node is None else read_path(node)


def _kind(cls: type[S], weight: Weight, left: bool) -> S:
    experts, first, second = weight.shape
    last = left != weight.transposed
    sizes = (second, first) if last else (first, second)
    return cls(*sizes, weight.path.rpartition(".")[2], experts, transposed=not last, last=last, left=left)


def _bind(kind: Kind, node: Node, wrap: Callable[[Node], Any]) -> Kind:
    assert isinstance(kind, Batched)
    picks = view_of(node.args[0 if kind.left else 1]).picks
    return kind if picks is None else replace(kind, picks=wrap(picks))


def _bind_grouped(kind: Kind, node: Node, wrap: Callable[[Node], Any]) -> Kind:
    assert isinstance(kind, Grouped)
    ends, product = node_of(argument(node, (2, "offs"))), node.target
    assert ends is not None
    assert callable(product)
    return replace(kind, picks=wrap(ends), product=product)


def _stub(kind: Kind, biased: bool) -> nn.Module:
    assert isinstance(kind, Batched)
    module = nn.Module()
    sizes = (kind.in_features, kind.out_features)
    module.register_parameter(
        kind.leaf, nn.Parameter(torch.empty(kind.count, *(sizes if kind.transposed else sizes[::-1])))
    )
    return module


BATCHED = OpSpec(
    kind=Batched,
    calls={
        **dict.fromkeys((torch.bmm, aten.bmm.default), _places),
        **dict.fromkeys((torch.matmul, operator.matmul, aten.matmul.default), _places_of_matmul),
    },
    read=_read,
    bind=_bind,
    stub=_stub,
)
GROUPED = OpSpec(
    kind=Grouped,
    calls={
        aten._grouped_mm.default: Places(weight=(1, "mat2"), bias=None),
        "transformers.grouped_mm_fallback.default": Places(bias=None),  # in the place of it, but for bfloat16
    },
    read=_read_grouped,
    bind=_bind_grouped,
    stub=_stub,
)
