"""Bases in other forms: quantised ones, and a package by AOTInductor."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import fxpeft
from fxpeft.tools.gpu_check.check import COMPILER, Check, Setting
from fxpeft.tools.gpu_check.models import ALL, MAX_RANK, llama, logits, served

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantised(setting: Setting, kind: str) -> dict[str, Any]:
    """Slots against the training subgraph on the same quantised weights, eager and compiled."""
    chosen: Any
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        chosen = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "8-bit":
        chosen = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    else:
        chosen = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=setting.dtype)  # type: ignore[no-untyped-call]
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(prefix="fxpeft-gpu-check-") as root:
        llama(setting, hidden=128 if setting.tiny else 512).save_pretrained(root)

        def make() -> Any:
            model: Any = AutoModelForCausalLM.from_pretrained(
                root, quantization_config=chosen, dtype=setting.dtype, device_map=str(setting.device)
            )
            return model.eval().requires_grad_(False)

        # the kernels choose their way by the rows' number and round to half precision on it
        with served(setting, make=make, tolerance=5e-2) as each:
            if all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in _targets(each.model)):
                raise AssertionError("the base is not quantised")
            swaps = each.walk(each.model)
            swaps += each.walk(torch.compile(each.model), rounds=1)
    return {"swaps": swaps, "error": f"{each.outputs.worst:.1g}"}


def _targets(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in ALL]


@torch.no_grad()
def package(setting: Setting) -> dict[str, Any]:
    """A ``.pt2`` with slots, written, opened, and swapped in."""
    with tempfile.TemporaryDirectory(prefix="fxpeft-gpu-check-") as root:
        with served(setting) as each:
            inputs = {"input_ids": each.ids, "use_cache": False}
            path = fxpeft.package(llama(setting), Path(root, "model.pt2"), inputs, max_rank=MAX_RANK, targets=ALL)
            opened = fxpeft.open_package(path)
            for name, folder in each.folders.items():
                opened.load_adapter(folder, name)
            for name in (*each.folders, *each.folders):
                opened.set_adapter(name)
                each.outputs.expect(logits(opened, each.ids), name, f"the package with {name}")
            held = next(iter(each.folders))
            opened.set_adapter(held)
            for name in [*each.folders][::-1]:
                opened.hotswap(each.folders[name], held)
                each.outputs.expect(logits(opened, each.ids), name, f"the package with {name} from its folder")
            opened.disable()
            each.outputs.expect(logits(opened, each.ids), "off", "the package, off")
            return {"MB": round(path.stat().st_size / 1e6, 1), "swaps": 3 * len(each.folders) + 1}


CHECKS = (
    Check(
        "package",
        "A package by AOTInductor gives each adapter's output after each swap.",
        package,
        limit=150,
        needs=(COMPILER,),
    ),
    *(
        Check(
            name,
            f"Slots over a base quantised by {library} give what its training subgraph gives.",
            partial(quantised, kind=kind),
            limit=90,
            needs=(library,),
        )
        for name, library, kind in (
            ("bitsandbytes-4bit", "bitsandbytes", "4-bit"),
            ("bitsandbytes-8bit", "bitsandbytes", "8-bit"),
            ("torchao-int8", "torchao", "torchao"),
        )
    ),
)
