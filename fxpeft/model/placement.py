"""Where an adapter's tensors lie, and in which dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.passes.live.parameters import parameter_value
from fxpeft.passes.torch_private import FSDP

ZERO = "ds_status"  # what DeepSpeed's ZeRO-3 sets on the parameters that it keeps in parts


def placement(module: nn.Module, model: nn.Module, autocast: bool, leaf: str = "") -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a new adapter's parameters at a module, or at its parameter ``leaf``.

    Half precision becomes float32 with ``autocast``, as in PEFT; quantised weights count as half.
    """
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weight = parameter_value(module, leaf) if leaf else next(iter(module.parameters(recurse=False)), None)
    device = weight.device if weight is not None else next(model.parameters()).device
    if hook_device is not None and device.type == "meta":
        device = torch.device(hook_device)
    dtype = weight.dtype if weight is not None else torch.float32
    if autocast and (dtype in (torch.float16, torch.bfloat16) or not dtype.is_floating_point):
        dtype = torch.float32
    return device, dtype if dtype.is_floating_point else torch.float32


def home(tensor: Tensor, module: nn.Module) -> torch.device:
    """Where an adapter's own copy of a module's tensor lives: beside it, or where accelerate runs the module."""
    if not tensor.is_meta:
        return tensor.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def parted(module: nn.Module) -> list[str]:
    """Names of the parameters of which tensor parallelism has left a part in this process.

    FSDP2 parts them too, and makes them whole before a forward.
    """
    held = [leaf for leaf, parameter in module._parameters.items() if hasattr(parameter, "placements")]
    return [] if FSDP in vars(module) else held


def parted_dimension(module: nn.Module) -> int | str:
    """Along which dimension a linear module's weight is parted: 0 rows, 1 columns; a text: why no update can follow."""
    weight: Any = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or not hasattr(weight, "placements"):
        return f"it is a {type(module).__name__}, no Linear"
    mesh, places = weight.device_mesh, weight.placements
    dim = getattr(places[0], "dim", None)
    if mesh.ndim != 1 or not places[0].is_shard() or dim not in (0, 1):
        return f"its weight is placed as {places} on {mesh.ndim} dimensions: expected Shard(0) or Shard(1) on one"
    if weight.shape[dim] % mesh.size():
        return f"its weight, {list(weight.shape)}, doesn't fall into {mesh.size()} equal parts"
    return int(dim)
