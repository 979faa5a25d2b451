"""Comparisons of a model with PEFT's, for tests of more than one sort of target."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from closeness import allowed, assert_close
from peer_versions import LORA_ONLY, needs
from tiny import randomise, token_ids
from torch import Tensor, nn

import fxpeft


def peft_file(base: nn.Module, folder: Path, **fields: Any) -> Any:
    """PEFT's model with random adapter values, saved."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **fields)
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()  # type: ignore[arg-type]
    randomise((p for p in model.parameters() if p.requires_grad), seed=2)
    model.save_pretrained(str(folder))
    return model


def peft_reads(base: nn.Module, folder: Path) -> Any:
    """PEFT's model of what it finds in a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """A model and a config that both libraries take."""

    build: Callable[[], nn.Module]
    config: dict[str, Any]


def output(model: nn.Module) -> Tensor:
    """The logits, or what a net gives for fixed numbers."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if hasattr(inner, "config"):
        return model(token_ids()).logits
    shape = (2, 3, 16) if hasattr(inner, "line") else (3, 6)
    return model(torch.randn(shape, generator=torch.Generator().manual_seed(3)))


@torch.no_grad()
def from_peft(case: Case, folder: Path) -> Tensor:
    """Save an adapter with PEFT; what PEFT computes with it."""
    if case.config.get("bias") == "lora_only":
        needs(*LORA_ONLY)
    model = peft.get_peft_model(case.build(), peft.LoraConfig(**case.config)).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    wanted = output(model)
    assert float((wanted - output(case.build())).abs().max()) > 10 * allowed(wanted)  # it does something
    model.save_pretrained(str(folder))
    return wanted


def gradients(output: Tensor, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a fixed loss, by the checkpoint key of the parameter that shares its memory."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    (output.float() * weight).sum().backward()
    found = {p.data_ptr(): p.grad for p in model.parameters() if p.grad is not None}
    return {k: found[v.data_ptr()] for k, v in tensors.items() if v.data_ptr() in found}


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
        assert_close(output(model), output(theirs))
    for layer in (m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        if "a" in layer.scaling:
            layer.set_scale("a", -0.5)
    fxpeft.set_scale(model, "a", -0.5)
    assert_close(output(model), output(theirs))
    with theirs.disable_adapter(), fxpeft.disabled(model):
        assert_close(output(model), output(theirs))
