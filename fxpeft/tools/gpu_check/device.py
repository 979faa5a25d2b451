"""What there is to run on, and which versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "fxpeft", "torch", "transformers", "peft", "triton", "accelerate", "safetensors", "bitsandbytes", "torchao",
)  # fmt: skip


def found_kind() -> str | None:
    """The type of the machine's accelerator, as ``cuda``; ``None``: it has none that works."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def versions() -> dict[str, str | None]:
    """Package -> version; ``None``: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"python": platform.python_version(), **found}


def about(kind: str) -> dict[str, Any]:
    """Name, memory and the like of the device of a type."""
    module = torch.get_device_module(torch.device(kind))
    if kind == "cpu" or not hasattr(module, "get_device_properties"):
        return {"kind": kind, "name": _processor() if kind == "cpu" else kind}
    properties = module.get_device_properties(module.current_device())
    found = {"kind": kind, "name": properties.name, "GB": round(properties.total_memory / 1e9, 1)}
    if kind == "cuda":
        found["capability"] = ".".join(map(str, module.get_device_capability()))
        found["runtime"] = torch.version.cuda or getattr(torch.version, "hip", None)
        found["processors"] = properties.multi_processor_count
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
