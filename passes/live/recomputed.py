"""What a generated forward calls where values are made again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from fxpeft.passes.torch_private import is_recorded, is_transformed


def recompute(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    operands: tuple[Any, ...],
    casts: bool = False,
    ahead: tuple[tuple[int, int], ...] = (),
) -> Any:
    """``function(*inputs, *operands)``, of which autograd keeps the arguments and nothing else.

    Where the function is looked into, by a compiler that decides itself or by a transform of ``torch.func``, and where
    no operand is trained, it is called as it is.

    Args:
        operands: parameters, what follows from them, and modules.
        casts: autograd would keep nothing else but what the function casts.
        ahead: inputs with which it begins by casting them like an operand: places of both.
    """
    trained = [o for o in operands if isinstance(o, Tensor) and o.requires_grad]
    if not trained or not torch.is_grad_enabled() or not all(isinstance(value, Tensor) for value in inputs):
        return function(*inputs, *operands)
    if casts and all(o.dtype is inputs[0].dtype for o in trained) and not autocast_of(inputs[0].device.type)[0]:
        return function(*inputs, *operands)
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return function(*inputs, *operands)
        if not casts:
            return checkpoint(function, *inputs, *operands, use_reentrant=False)
        # a cast that several sites have in common becomes one node; what it is for is not marked, since a marked one
        # that a later marked one reads is kept
        given = list(inputs)
        for place, like in ahead:
            given[place] = checkpoint(cast_like, given[place], operands[like], use_reentrant=False)
        return function(*given, *operands)
    if is_transformed() or is_recorded():
        return function(*inputs, *operands)
    return _Recomputed.apply(function, *inputs, *operands)  # type: ignore[no-untyped-call]


def cast_like(value: Tensor, other: Tensor) -> Tensor:
    """``value.type_as(other)``, without a call where there is nothing to cast."""
    return value if value.dtype is other.dtype else value.to(other.dtype)


def drop(value: Tensor, other: Tensor, dropout: nn.Dropout) -> Tensor:
    """``dropout(value.type_as(other))``.

    Compiled, it drops and then casts: the casts of one input for several sites would become one node, which is kept
    for all of them.
    """
    if not torch.compiler.is_compiling() or not dropout.training or not 0 < dropout.p < 1 or value.dtype is other.dtype:
        made: Tensor = dropout(cast_like(value, other))
        return made
    mask = dropout(torch.ones_like(value, dtype=other.dtype))
    return torch.where(mask != 0, value, 0).to(other.dtype) / (1 - dropout.p)


class _Recomputed(torch.autograd.Function):
    """Calls a function without a graph, and again with one in the backward pass, under the same autocast and dice.

    A gradient of the gradient is right: then the second call's graph goes on to that of the arguments.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.function = function
        ctx.rest = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.state = State(tensors[0], draws=any(isinstance(a, nn.Module) and a.training for a in arguments))
        # detached, since autocast would keep a cast parameter without a graph for others that have one
        return function(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given, again = iter(ctx.saved_tensors), torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[1:]
        with ctx.state.restored(), torch.enable_grad():
            arguments = [
                rest if rest is not None else _leaf(next(given), needed, again)
                for rest, needed in zip(ctx.rest, wanted, strict=True)
            ]
            made = ctx.function(*arguments)
        results = made if isinstance(made, tuple) else (made,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        leaves = [a for a, needed in zip(arguments, wanted, strict=True) if needed]
        if not pairs or not leaves:
            return (None,) * len(ctx.needs_input_grad)
        outputs, ups = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, ups, create_graph=again, allow_unused=True))
        return None, *(next(found) if needed else None for needed in wanted)


def _leaf(tensor: Tensor, needed: bool, again: bool) -> Tensor:
    """An argument to differentiate by: with its own graph behind it, but not its hooks, or with none."""
    if again:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(needed)


class State:
    """What a call depends on beside its arguments.

    Args:
        draws: whether it draws random numbers.
    """

    def __init__(self, like: Tensor, *, draws: bool) -> None:
        kind = like.device.type
        self.device = kind
        self.autocast = autocast_of(kind)
        self.draws = draws
        if draws:
            self.cpu = torch.get_rng_state()
            self.devices, self.states = get_device_states(like)

    def restored(self) -> AbstractContextManager[Any]:
        """A block in which it is as it was."""
        stack = ExitStack()
        enabled, dtype = self.autocast
        if enabled:
            stack.enter_context(torch.autocast(self.device, dtype, cache_enabled=False))
        elif autocast_of(self.device)[0]:
            stack.enter_context(torch.autocast(self.device, enabled=False))
        if self.draws:
            stack.enter_context(torch.random.fork_rng(self.devices, device_type=self.device))
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.device)
        return stack


def autocast_of(device: str) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on for a type of device, and to what."""
    if not torch.amp.is_autocast_available(device):
        return False, None
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
