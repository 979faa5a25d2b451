"""An adapter's tensors whole, where this process holds parts of them: FSDP2's, FSDP1's and DeepSpeed's ZeRO-3.

Gathering is a collective: every process calls, in the same order. What can't be gathered is refused by name, before
anything is written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from fxpeft.adapters.agreement import in_group
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.values import Values
from fxpeft.model.placement import ZERO
from fxpeft.model.walk import full_tensor
from fxpeft.model.wrappers import submodule
from fxpeft.passes.torch_private import FSDP

Key = TypeVar("Key")
Shape = tuple[int, ...]


def whole_adapter(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter itself where this process holds all of it, else one of the same name that holds copies of all.

    Args:
        model: as the caller has it: FSDP1 gathers from its wrappers.

    Raises:
        AdapterError: parts that nothing here can gather; they are named.
    """
    if not adapter.parts:
        return adapter
    shapes = {key: tuple(value.shape) for key, value in adapter.values.flat().items()}

    def read() -> Mapping[tuple[str, str, str], Tensor]:
        try:
            return adapter.current().flat()
        except AttributeError as error:
            raise AdapterError(
                f"adapter {adapter.name!r}: its parameters are gone from its modules ({error}); FSDP1 has to keep "
                "the original parameters"
            ) from None

    found = read()
    if not parted(found, shapes):
        return adapter
    found = gather(model, read, found, shapes, adapter.parameters())
    cut = [
        f"{place or field}: {name or 'value'}: expected {list(shapes[key])}, found {list(found[key].shape)}"
        for key in parted(found, shapes)
        for field, place, name in [key]
    ]
    if cut:
        raise AdapterError(
            f"adapter {adapter.name!r}: its parameters are not whole here:\n{listing(cut)}\ncall this on every "
            "process, with the model as FSDP or DeepSpeed wrapped it; with FSDP1, inside of "
            "FullyShardedDataParallel.summon_full_params(model) works too"
        )
    return replace(adapter, values=Values.from_flat(found), parts={})


def parted(tensors: Mapping[Key, Tensor], shapes: Mapping[Key, Shape]) -> list[Key]:
    """The tensors of which this process holds a part.

    Args:
        shapes: of the whole ones.
    """
    return [key for key, t in tensors.items() if hasattr(t, "full_tensor") or tuple(t.shape) != shapes[key]]


def gather(
    model: nn.Module,
    read: Callable[[], Mapping[Key, Tensor]],
    held: Mapping[Key, Tensor],
    shapes: Mapping[Key, Shape],
    parameters: Iterable[nn.Parameter],
) -> dict[Key, Tensor]:
    """Tensors as they are whole, or as they are where nothing here can gather them.

    Args:
        read: gives them as they are when it is called. held: what it gave before.
        shapes: of the whole ones.
        parameters: those of them that are parameters.
    """

    def take() -> None:
        now = read()
        whole = now.keys() - parted(now, shapes)
        found.update({key: now[key].detach().clone() for key in parted(found, shapes) if key in whole})

    found = {key: full_tensor(value) for key, value in held.items()}
    partitioned = [parameter for parameter in parameters if hasattr(parameter, ZERO)]
    if partitioned:
        with importlib.import_module("deepspeed").zero.GatheredParameters(partitioned):
            take()
    if parted(found, shapes) and in_group():
        fsdp = importlib.import_module("torch.distributed.fsdp").FullyShardedDataParallel
        for unit in fsdp.fsdp_modules(model):  # one after the other: the base's come along
            with fsdp.summon_full_params(unit, recurse=False, writeback=False):
                take()
    return found


def check_trained(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Refuse to train what comes into modules whose parameters several processes have parted before.

    FSDP and ZeRO-3 manage what was there when they wrapped the model. What comes later would start from other values
    in each process, and none would hear of the others' gradients.

    Raises:
        AdapterError: an adapter that would be trained; the modules are named.
    """
    if not in_group() or dist.get_world_size() == 1:
        return
    for adapter in adapters:
        trains = not adapter.config.inference_mode if adapter.trained is None else adapter.trained
        late = [name for name in sorted(adapter.hosts()) if trains and _comes_late(model, adapter, name)]
        if late:
            raise AdapterError(
                f"adapter {adapter.name!r} can't be trained in modules that FSDP or ZeRO-3 has parted already:\n"
                f"{listing(late)}\nits parameters would not be synchronised. Add or load it before the model is "
                "sharded; to run it only, load_adapter(trainable=False)"
            )


def _comes_late(model: nn.Module, adapter: Adapter, name: str) -> bool:
    """Whether a module is managed, and what the adapter has there, or will have, is not."""
    module, part = submodule(model, name), adapter.parts.get(name)

    def managed(part: nn.Module) -> bool:
        own = (
            FSDP in vars(each) or any(hasattr(p, ZERO) for p in each._parameters.values()) for each in part.modules()
        )
        return any(own)

    return managed(module) and (part is None or not managed(part))


def check_whole(adapter: Adapter) -> None:
    """Refuse an adapter of which processes hold parts where whole tensors are needed.

    Raises:
        AdapterError: the first part is named.
    """
    for part in adapter.parts.values():
        for name, parameter in part.named_parameters():
            if hasattr(parameter, "full_tensor") or hasattr(parameter, ZERO) or FSDP in vars(part):
                raise AdapterError(
                    f"adapter {adapter.name!r}: its parameters are in parts ({name}) by FSDP, ZeRO-3 or tensor "
                    "parallelism, slots are whole: save_adapter it, delete_adapter, prepare_hotswap, and load_adapter "
                    "what was saved; or prepare the model before it is sharded"
                )
