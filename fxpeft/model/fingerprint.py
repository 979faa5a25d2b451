"""Which base model an adapter or a package belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from fxpeft.model.walk import base_state

KEY = "fxpeft_base"  # in the metadata of adapter_model.safetensors, which PEFT doesn't read
SAMPLE = 256


def fingerprint(model: nn.Module) -> str:
    """A hash of the base: names, shapes and, of each tensor, up to 256 numbers at even distances.

    The numbers are taken as bfloat16, so that a float32 model and its bfloat16 copy are the same base;
    reading a few of each tensor keeps it cheap. Another checkpoint, a fine-tuned one too, changes
    nearly all of them. What fxpeft put into the model doesn't count; of a quantised tensor only the
    shape does.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            continue  # quantised: its numbers are its library's, which may not even let them be viewed flat
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        if sample.numel() and not sample.is_meta:
            number = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
            digest.update(number.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
