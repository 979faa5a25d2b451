"""How many parameters of a model are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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
