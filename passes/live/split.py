"""A stack of matrices beside its update: ``weight + left @ right`` that is never added up for what multiplies by it.

The experts of a mixture lie in one parameter, and each row of the input meets one of its matrices. What a forward does
with the parameter is seen as it runs: it takes matrices out of the stack and multiplies rows by them, in a loop, in a
batch or in a grouped product. Then each such product is done three times, with ``weight``, and with the factors of the
update one after the other, for the rows that go there. Whatever else is done with it is done with the sum.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fxpeft.passes.live.reading import ASKS
from fxpeft.passes.targets.operations.parameter import add_product
from fxpeft.passes.torch_private import GROUPED_PRODUCTS, is_recorded, pytree

# the forwards of Transformers that are written in torch's operations alone, as a config names them; a kernel that
# takes a tensor's memory has to be given the sum
FORWARDS = ("eager", "grouped_mm", "batched_mm")
_MATMUL: Collection[Any] = frozenset(
    (torch.matmul, torch.mm, torch.bmm, operator.matmul, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
)
_ASKS = ASKS - {"data_ptr", "stride", "is_contiguous"}


def why_whole(module: nn.Module) -> str:
    """Why a module's forward is given the sum of a stack and its update; empty where it is given a :class:`Split`."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "_experts_implementation"):
        return "its forward is none of Transformers' for experts, so what it does with the parameter isn't known before"
    name = config._experts_implementation
    if name is None or name in FORWARDS:
        return ""
    return f"experts_implementation={name!r} takes the parameter's memory; set_experts_implementation({FORWARDS[1]!r})"


def given(module: nn.Module, value: Any) -> Any:
    """What a module's forward reads: a :class:`Split` as it is, or the sum where it has to be a tensor."""
    if not isinstance(value, Split):
        return value
    if why_whole(module) or (torch.compiler.is_compiling() and is_whole_compiled(module, value.dtype)):
        return value.whole()
    return value


def is_whole_compiled(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a compiled forward that multiplies with a :class:`Split` in eager is given the sum.

    Dynamo asks no argument of torch's own grouped product, which Transformers calls there in bfloat16 alone.
    """
    config: Any = module.config
    return config._experts_implementation == "grouped_mm" and dtype is torch.bfloat16


class Split:
    """``weight + left @ right`` of two or three dimensions, as torch's functions and methods see it.

    Args:
        weight: ``[..., p, q]``, or another sum. left: ``[..., p, rank]``. right: ``[..., rank, q]``.
    """

    def __init__(self, weight: Any, left: Tensor, right: Tensor) -> None:
        self._weight, self._left, self._right = weight, left, right
        self._sum: Tensor | None = None
        self._parts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def whole(self) -> Tensor:
        """The sum, computed once."""
        if self._sum is None:
            weight = self._weight.whole() if isinstance(self._weight, Split) else self._weight
            given = (weight, self._left, self._right)
            self._sum = add_product(*given) if weight.ndim == 3 else add_product(*(t[None] for t in given))[0]
        return self._sum

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._weight if name in _ASKS else self.whole(), name)

    def __len__(self) -> int:
        return len(self._weight)

    def __getitem__(self, index: Any) -> Any:
        listed = isinstance(index, Tensor) and not index.is_floating_point() and index.ndim < 2
        if self.ndim != 3 or not (listed or type(index) is int):
            return self.whole()[index]
        if listed and index.ndim == 0 and not torch.compiler.is_compiling() and not is_recorded():
            index = int(index)
        if type(index) is not int:
            return self._each(lambda stack: stack[index])
        if self._parts is None:  # whose gradients are put together once, where each select's is as large as the stack
            self._parts = self._left.unbind(), self._right.unbind()
        return Split(self._weight[index], self._parts[0][index], self._parts[1][index])

    def transpose(self, first: int, second: int) -> Any:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.whole().transpose(first, second)
        return Split(self._weight.transpose(-2, -1), self._right.transpose(-2, -1), self._left.transpose(-2, -1))

    def float(self) -> Split:
        return self._each(lambda part: part.float())

    def _each(self, change: Callable[[Any], Any]) -> Split:
        return Split(change(self._weight), change(self._left), change(self._right))

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[1], Split) and isinstance(args[0], Tensor):
            x, stack = args[0], args[1]
            if function is F.linear:
                return function(x, stack._weight, *args[2:], **kwargs) + F.linear(
                    F.linear(x, stack._right), stack._left
                )
            if len(args) == 2 and function in _MATMUL and not kwargs:
                return function(x, stack._weight) + function(function(x, stack._left), stack._right)
            if (
                len(args) == 2
                and {key for key, value in kwargs.items() if value is not None} == {"offs"}
                and x.ndim == 2
            ):
                left, right = _aligned(stack) if function in GROUPED_PRODUCTS else (stack._left, stack._right)
                update = function(function(x, left, **kwargs), right, **kwargs)
                return function(x, stack._weight, **kwargs) + update
        elif len(args) == 2 and isinstance(args[0], Split) and function in _MATMUL and not kwargs:
            stack, x = args
            return function(stack._weight, x) + function(stack._left, function(stack._right, x))
        args, kwargs = pytree.tree_map_only(Split, Split.whole, (args, kwargs))
        return function(*args, **kwargs)


def _aligned(stack: Split) -> tuple[Tensor, Tensor]:
    """The factors with zeros after their ranks: torch's grouped product takes rows of a multiple of 16 bytes only."""
    missing = -stack._left.shape[-1] % (16 // stack._left.element_size())
    left, right = F.pad(stack._left, [0, missing]), F.pad(stack._right, [0, 0, 0, missing])
    return left.contiguous(), right.contiguous()


def split_product(weight: Any, left: Tensor, right: Tensor) -> Any:
    """``weight + left @ right`` of stacks of matrices as a :class:`Split`. In a graph this is one node.

    The factors are rounded to the weight's dtype, as they are for the sum.
    """
    given = (weight, left, right)
    if not isinstance(weight, Split) and has_torch_function(given):
        return handle_torch_function(split_product, given, *given)
    return Split(weight, left.to(weight.dtype), right.to(weight.dtype))
