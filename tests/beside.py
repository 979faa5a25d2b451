"""Comparisons of a model with PEFT's, for tests of more than one sort of target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft


def same(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal to within the tolerance times the largest value, or the tolerance itself for small ones."""
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@torch.no_grad()
def check_sums(
    build: Callable[[], nn.Module],
    settings: Mapping[str, Mapping[str, Any]],
    folder: Path,
    output: Callable[[Any], Tensor],
    *,
    slots: bool,
) -> None:
    """Adapters ``a`` and ``b`` together, alone, one at another strength, and none."""
    theirs: Any = peft.get_peft_model(build(), peft.LoraConfig(**settings["a"]), adapter_name="a").eval()
    theirs.add_adapter("b", peft.LoraConfig(**settings["b"]))
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(folder))
    model = build()
    for name in settings:
        fxpeft.load_adapter(model, folder / name, name)
    if slots:
        fxpeft.prepare_hotswap(model, 16)
    for names in (["a", "b"], ["b"], ["b", "a"], ["a"]):
        theirs.base_model.set_adapter(names)
        fxpeft.set_adapter(model, names)
        same(output(model), output(theirs), 1e-5)
    for layer in (m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        if "a" in layer.scaling:
            layer.set_scale("a", -0.5)
    fxpeft.set_scale(model, "a", -0.5)
    same(output(model), output(theirs), 1e-5)
    with theirs.disable_adapter(), fxpeft.disabled(model):
        same(output(model), output(theirs), 1e-5)
