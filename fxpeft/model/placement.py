"""Where an adapter's tensors lie, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxpeft.passes.live.parameters import parameter_value

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
