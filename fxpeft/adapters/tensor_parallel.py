"""An adapter's values in a model that tensor parallelism has parted: alike in all processes, cut as the weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxpeft.adapters.agreement import in_group
from fxpeft.methods.values import Values
from fxpeft.model.placement import parted, parted_dimension
from fxpeft.model.walk import base_modules


def alike(model: nn.Module, values: Values) -> Values:
    """Values as the first process has them: where each drew its own first ones they differ, and nobody else sees to it.

    All processes call this. Of a model that is not parted the values stay as they are.
    """
    if not in_group():
        return values
    cut = ((module, leaf) for _, module in base_modules(model) for leaf in parted(module))
    mesh: Any = next((module._parameters[leaf].device_mesh for module, leaf in cut), None)  # type: ignore[union-attr]
    if mesh is None:
        return values
    return values.each(lambda t: t if hasattr(t, "placements") else _spread(t, mesh, None).to_local())


def parted_values(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's A and B at a parted module as this process's parts of them, cut along what they share with the weight.

    Args:
        tensors: whole, and alike in all processes.
    """
    weight, cut = module._parameters["weight"], parted_dimension(module)
    shared = {"lora_B": 0} if cut == 0 else {"lora_A": 1}
    mesh = weight.device_mesh  # type: ignore[union-attr]
    return {name: t if hasattr(t, "placements") else _spread(t, mesh, shared.get(name)) for name, t in tensors.items()}


def cut_as(tensor: Tensor, own: Any) -> Tensor:
    """A whole tensor, alike in all processes, as this process's part of it where ``own`` is in parts."""
    if not hasattr(own, "placements") or hasattr(tensor, "placements"):
        return tensor
    library = importlib.import_module("torch.distributed.tensor")
    cut: Tensor = library.distribute_tensor(tensor, own.device_mesh, own.placements)
    return cut


def _spread(tensor: Tensor, mesh: Any, dim: int | None) -> Any:
    """The first process's tensor as a ``DTensor``, cut along a dimension or whole in all of them."""
    library = importlib.import_module("torch.distributed.tensor")  # not where nothing is parted
    place = library.Replicate() if dim is None else library.Shard(dim)
    return library.distribute_tensor(tensor, mesh, [place])
