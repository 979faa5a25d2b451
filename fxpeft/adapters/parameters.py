"""Which parameters of a model are trained, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxpeft.adapters.penalty import watch_loss
from fxpeft.adapters.state import state_of
from fxpeft.errors import AdapterError
from fxpeft.model.wrappers import unwrap


def set_requires_grad(model: nn.Module, names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train these adapters or freeze them, whether they are active or not; the others stay as they are.

    It holds until the active adapters are chosen again (:func:`fxpeft.set_adapter`, or another adapter comes), which
    trains the active ones as always; through :func:`fxpeft.disabled`, under which nothing is trained, it holds.

    Raises:
        AdapterError: no such adapter, or the model is prepared: slots hold no parameters.
    """
    model, state = unwrap(model), state_of(model)
    adapters = [state.get(name) for name in ([names] if isinstance(names, str) else names)]
    if state.serving is not None:
        raise AdapterError(
            "the model serves its adapters from slots, which are not trained: call release_hotswap first, after which "
            "they have parameters again"
        )
    for adapter in adapters:
        state.note(adapter)
        adapter.trained = requires_grad
        for parameter in adapter.parameters():
            parameter.requires_grad_(requires_grad)
    watch_loss(model, state)


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained; prints as a line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_parameters(model: nn.Module, *, show: bool = True) -> ParameterCount:
    """Count the parameters that an optimiser would train; 4-bit weights count as the weights they hold.

    Args:
        show: print the line that PEFT's ``print_trainable_parameters`` prints.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    counted = ParameterCount(trainable, total)
    if show:
        print(counted)
    return counted
