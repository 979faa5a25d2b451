"""Swaps through all adapters of a model, for tests of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from closeness import assert_close
from torch import Tensor, nn

import fxpeft


def walk(model: nn.Module, names: Collection[str], call: Callable[[], Tensor], expected: Mapping[str, Tensor]) -> None:
    """Through every adapter and back, each switched off and on again; nothing may compile again."""
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for name in [*names, *reversed([*names])]:
            fxpeft.set_adapter(model, name)
            assert_close(call(), expected[name])
            fxpeft.disable_adapters(model)
            assert_close(call(), expected["off"])
            fxpeft.enable_adapters(model)


def swap_in_place(model: nn.Module, names: Collection[str], folder: str) -> list[str]:
    """Swap through all, and the first one's values for a file's: no buffer moves; what they are called."""
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for name in names:
        fxpeft.set_adapter(model, name)
    fxpeft.hotswap(model, folder, next(iter(names)))
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before
    return list(before)
