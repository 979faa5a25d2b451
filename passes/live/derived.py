"""What a generated forward calls where a site's gradients are written out: one autograd function for all of a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.passes.live.recomputed import State, autocast_of
from fxpeft.passes.torch_private import is_recorded, is_transformed

Like: TypeAlias = tuple[torch.dtype, torch.Size]
_PLAIN = (Tensor, nn.Parameter)


class Forms(NamedTuple):
    """A site's mathematics, written out by :mod:`fxpeft.passes.live.derive`.

    Args:
        kept: its result, the values that are kept, dtypes and shapes of others, and how masks were drawn.
        again: the values that are kept, from the arguments that are. backward: the gradients of the inputs and of what
            is trained. saved: places of the arguments that are kept.
    """

    kept: Callable[..., Any]
    again: Callable[..., Any]
    backward: Callable[..., Any]
    saved: tuple[int, ...]


def derived(
    site: Callable[..., Any],
    kept: Callable[..., Any],
    again: Callable[..., Any],
    backward: Callable[..., Any],
    saved: tuple[int, ...],
    casts: bool,
    inputs: tuple[Tensor, ...],
    trained: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    modules: tuple[nn.Module, ...],
) -> Any:
    """A site's result, of which autograd keeps the arguments at ``saved``, what ``kept`` gives, and nothing else.

    Where its calls are looked into, by a compiler or a transform of ``torch.func``, and where not all that may be
    trained is, it is called as it is.

    Args:
        site: all of it, as it is called then. kept, again, backward, saved: see :class:`Forms`.
        casts: autograd by itself would keep nothing else but what is cast.
        trained: what follows from parameters that an adapter brought. others: what else it reads of the site.
        modules: dropouts.
    """
    arguments = (*inputs, *trained, *others)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return site(*arguments, *modules)
    if (
        any(type(t) not in _PLAIN for t in arguments)
        or not all(t.requires_grad for t in trained)
        or any(t.requires_grad for t in others)
        or is_transformed()
        or is_recorded()
    ):
        return site(*arguments, *modules)
    dtype = inputs[0].dtype
    if casts and all(t.dtype is dtype for t in (*inputs, *trained)) and not autocast_of(inputs[0].device.type)[0]:
        return site(*arguments, *modules)
    counts = len(inputs), len(trained), len(arguments)
    return _Derived.apply(Forms(kept, again, backward, saved), counts, *arguments, *modules)  # type: ignore[no-untyped-call]


class _Derived(torch.autograd.Function):
    """Calls what was written out, under one autocast.

    A gradient of the gradient is right: then what is kept is made again from what it follows from.
    """

    @staticmethod
    def forward(ctx: Any, form: Forms, counts: tuple[int, int, int], *arguments: Any) -> Any:
        modules = arguments[counts[2] :]
        ctx.state = State(arguments[0], draws=any(module.training for module in modules))
        if ctx.state.autocast[0]:  # it would keep a cast parameter without a graph for others that have one
            arguments = (*(a.detach() for a in arguments[: counts[2]]), *modules)
        result, kept, ctx.likes, ctx.drawn = form.kept(*arguments)
        ctx.save_for_backward(*(arguments[place] for place in form.saved), *kept)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.counts = form, counts
        return result

    @staticmethod
    def backward(ctx: Any, up: Tensor | None) -> tuple[Tensor | None, ...]:
        form, (inputs, trained, _) = ctx.form, ctx.counts
        needs = ctx.needs_input_grad[2:]
        if up is None:
            return (None,) * (2 + len(needs))
        saved = ctx.saved_tensors
        with ctx.state.restored():
            noises = tuple(noise(*how) for how in ctx.drawn)
            given, kept = saved[: len(form.saved)], saved[len(form.saved) :]
            if torch.is_grad_enabled():
                kept = form.again(ctx.likes, noises, *given)
            grads = form.backward(up, needs[:inputs], ctx.likes, noises, *given, *kept)
        return None, None, *grads, *(None,) * (len(needs) - inputs - trained)


def drawn(value: Tensor, dropout: nn.Dropout) -> tuple[Any, tuple[Any, ...]]:
    """What a dropout multiplies a value with, and what :func:`noise` needs to draw it again."""
    probability = dropout.p if dropout.training else 0.0
    # on no device: its strides alone, in whose order a mask is drawn
    how = torch.empty_like(value, device="meta"), value.device, probability
    return noise(*how), how


def noise(like: Tensor, device: torch.device, probability: float) -> Any:
    """A mask over the probability of what is left, as ``F.dropout`` draws it."""
    if not probability or not like.numel():
        return None
    if device.type == "cpu" and probability < 1:
        return torch.empty_like(like, device=device).bernoulli_(1 - probability).div_(1 - probability)
    return F.dropout(torch.ones_like(like, device=device), probability)


def dropped(value: Any, mask: Tensor | None, *cast: Tensor | None) -> Any:
    """A value, or its gradient, after dropout.

    Args:
        cast: what the value was cast from, where nobody else reads the value.
    """
    if mask is None or value is None:
        return value
    own = cast and cast[0] is not value and not torch.is_grad_enabled()
    return value.mul_(mask) if own else value * mask


def add_product(total: Tensor, value: Tensor, weight: Tensor, fresh: bool) -> tuple[Tensor, Like]:
    """``total + F.linear(value, weight)``, into one memory where that is no other's; and what the product is like.

    Args:
        fresh: nobody else reads ``total``.
    """
    wide, shape = value.dtype, total.shape
    if (
        shape[:-1] != value.shape[:-1]
        or shape[-1] != weight.shape[0]
        or torch.promote_types(total.dtype, wide) is not wide
        or torch.is_autocast_enabled(total.device.type)
    ):
        product = F.linear(value, weight)
        return total + product, like(product)
    summed = _in(total, wide)
    rows, given = _rows(summed), _rows(value)
    own = fresh or summed is not total
    made = rows.addmm_(given, weight.t()) if own else torch.addmm(rows, given, weight.t())
    return made if made.ndim == len(shape) else made.view(shape), (wide, shape)


def like(value: Tensor) -> Like:
    """What a gradient has to be like."""
    return value.dtype, value.shape


def cast(value: Tensor, of: Like) -> Tensor:
    """A value in the dtype that it was cast to."""
    return _in(value, of[0])


def _in(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype is dtype else value.to(dtype)


def _rows(value: Tensor) -> Tensor:
    """``[..., features]`` to ``[rows, features]``."""
    return value if value.ndim == 2 else value.reshape(-1, value.shape[-1])


def narrowed(up: Tensor | None, of: Like, before: Tensor | None = None) -> Tensor | None:
    """A gradient like the value that it is of.

    Args:
        before: that from which ``up`` was cast.
    """
    if up is None:
        return None
    dtype, shape = of
    exact = before is not None and before.dtype is dtype and torch.promote_types(dtype, up.dtype) is up.dtype
    if exact and before.shape == shape:  # type: ignore[union-attr]
        return before
    summed = up if up.shape == shape else up.sum_to_size(shape)
    return _in(summed, dtype)


def times(up: Tensor | None, factor: Any, of: Like, needed: bool = True) -> Tensor | None:
    """The gradient of one factor."""
    return None if up is None or not needed else narrowed(up * factor, of)


def minus(up: Tensor | None) -> Tensor | None:
    """The gradient of what is subtracted."""
    return None if up is None else -up


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def linear_value(up: Tensor | None, weight: Tensor, of: Like, needed: bool = True) -> Tensor | None:
    """The gradient of ``x`` of ``F.linear(x, weight)``."""
    return None if up is None or not needed else narrowed(torch.matmul(up, _in(weight, up.dtype)), of)


def linear_weight(up: Tensor | None, value: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of ``weight`` of ``F.linear(value, weight)``."""
    if up is None:
        return None
    rows, given = _rows(up), _in(_rows(value), up.dtype)
    # the narrower one first: the other way round takes BLAS twice the time
    narrow = rows.shape[1] <= given.shape[1]
    return _in(torch.mm(rows.t(), given) if narrow else torch.mm(given.t(), rows).t(), weight.dtype)


def matmul_value(up: Tensor | None, weight: Tensor, of: Like, needed: bool = True) -> Tensor | None:
    """The gradient of ``x`` of ``x @ weight``, of a matrix."""
    return linear_value(up, weight.mT, of, needed)


def matmul_weight(up: Tensor | None, value: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of ``weight`` of ``value @ weight``, of a matrix."""
    found = linear_weight(up, value, weight)
    return None if found is None else found.t()
