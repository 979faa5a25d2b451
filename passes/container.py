"""What fxpeft adds to a live module."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RESERVED = re.compile(r"_active\d+")  # names under which generated code finds what is active


def active_name(number: int) -> str:
    """Where generated code finds a container's active child: ``_active0``, ..."""
    return f"_active{number}"


class Read(nn.Module):
    """A part whose tensors generated code reads without calling it.

    accelerate's hooks send tensors away and bring them for a call of their own module. So where one comes here, these
    tensors stay where the hook would bring them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook":
            for hook in getattr(value, "hooks", (value,)):
                _keep_here(self, hook)


def _keep_here(part: nn.Module, hook: Any) -> None:
    if not getattr(hook, "offload", False):
        return
    hook.offload = False  # nothing to bring, and nothing to send away
    for held in (part._parameters, part._buffers):
        for name, tensor in held.items():
            if tensor is not None and tensor.is_meta:
                value = hook.weights_map[name].detach().to(hook.execution_device)
                kept = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                held[name] = kept


class Container(Read):
    """Holds what fxpeft adds to a live module; never part of the base model.

    Its children have the names that users and files know, such as an adapter's. Generated code reads
    the active ones at ``_active0``, ``_active1``, ...: the same code serves adapters of every name.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Container:
        if not torch.is_inference_mode_enabled():
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        with torch.inference_mode(False), torch.no_grad():  # what was made inside of it can't be written outside
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def show(self, parts: Sequence[nn.Module]) -> list[nn.Module]:
        """Let these children, and no others, be the active ones, in this order; returns those that were."""
        state = vars(self)
        before = {name: part for name, part in state.items() if RESERVED.fullmatch(name)}
        shown = {active_name(number): part for number, part in enumerate(parts)}
        state.update(shown)
        for name in before.keys() - shown.keys():
            del state[name]
        return list(before.values())

    def drop(self, name: str) -> None:
        """Forget a child, active or not."""
        part = self._modules.pop(name, None)
        for key in [k for k, value in vars(self).items() if value is part and RESERVED.fullmatch(k)]:
            del vars(self)[key]

    def __setattr__(self, name: str, value: Any) -> None:
        # what stands in the place of a child, a wrapper or DataParallel's replica, is active where that was
        before = self._modules.get(name) if isinstance(value, nn.Module) else None
        super().__setattr__(name, value)
        if before is not None:
            for key in [k for k, held in vars(self).items() if held is before and RESERVED.fullmatch(k)]:
                vars(self)[key] = value
