"""Attributes of bound modules, as others read them: another's in the place of the module's own, or none at all.

Code that computes with a module's ``weight`` and never calls the module (a fused loss with a head's) passes by what
the module computes now. Where another module or tensor answers for it, the attribute gives that one's. Where an update
is added in the forward there is no such tensor, and who takes the weight inside of a model's call is refused: code that
only asks for its dtype, its device and the like is not, nor what runs outside of calls (initialisation, tying,
quantising, lists of parameters), nor what manages the module's own tensors. Under Dynamo no reader can be told apart:
there an attribute that gives another's does, and one that would refuse doesn't.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.passes.torch_private import FSDP, MODULE_CALL

# what is asked of a tensor that computes nothing with its values
ASKS = frozenset(
    (
        "dtype", "device", "shape", "ndim", "layout", "itemsize", "nbytes", "is_cuda", "is_meta", "requires_grad",
        "size", "dim", "numel", "stride", "element_size", "data_ptr", "is_floating_point", "is_contiguous",
    )
)  # fmt: skip
# they find, take away and set a module's own tensors by these attributes
_MANAGERS = ("torch.distributed.", "torch.nn.modules.module", "accelerate.", "deepspeed.")
_HARMLESS = ("torch.", "accelerate.", "deepspeed.", "fxpeft.")
_GENERATED = "<fxpeft "  # begins the file name of generated code


def elsewhere(name: str, read: Callable[[nn.Module], Any]) -> property:
    """An attribute that another answers for; who manages the module's own tensors sees and sets those."""

    def get(self: nn.Module) -> Any:
        managed = not torch.compiler.is_compiling() and _is_managed(self, sys._getframe(1))
        return _own(self, name) if managed else read(self)

    return property(get, *_setting(name))


def of_no_row(name: str, read: Callable[[nn.Module], Any]) -> property:
    """The same, of a module of which rows of a batch may have copies of their own.

    Raises, when it is read:
        AdapterError: while they have, by code that takes it past the module's forward: there is no copy for all rows.
    """

    def get(self: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return read(self)
        reader = sys._getframe(1)
        slot: Any = _slot(self)
        if _is_managed(self, reader):
            return _own(self, name)
        if slot is not None and slot.lanes.named.mask.shape[0] and _takes(reader, self):
            raise AdapterError(
                f"{slot.site}: {reader.f_code.co_name} ({_module_of(reader)}, line {reader.f_lineno}) computes with "
                f"its {name} without calling it, and rows of the batch have copies of their own: name no rows, or "
                f"leave {slot.site} out of modules_to_save"
            )
        return read(self)

    return property(get, *_setting(name))


def _is_managed(module: nn.Module, reader: FrameType) -> bool:
    """Whether a frame reads a module's own tensors to fetch or to part them."""
    state = vars(module)
    return (FSDP in state or "_hf_hook" in state) and _module_of(reader).startswith(_MANAGERS)


def past(name: str, site: str) -> property:
    """An attribute that only the module itself computes with, as long as an adapter changes what the module computes.

    Args:
        site: the module's dotted name, for messages.

    Raises, when it is read:
        AdapterError: by code that takes it past the module's forward.
    """

    def get(self: nn.Module) -> Any:
        value = _own(self, name)
        if not torch.compiler.is_compiling() and value is not None and not getattr(_slot(self), "idle", False):
            reader = sys._getframe(1)
            if not reader.f_code.co_filename.startswith(_GENERATED) and _takes(reader, self):
                raise AdapterError(
                    f"{site}: {reader.f_code.co_name} ({_module_of(reader)}, line {reader.f_lineno}) computes with its "
                    f"{name} without calling it, so the adapter there would be ignored, and never trained. Leave "
                    f"{site} out of target_modules, or name it in modules_to_save, which trains it whole"
                )
        return value

    return property(get, *_setting(name))


def _own(module: nn.Module, name: str) -> Any:
    state = vars(module)
    return state[name] if name in state else nn.Module.__getattr__(module, name)


def _setting(name: str) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module], None]]:
    """What sets and deletes a plain attribute of that name; parameters, buffers and modules go by another way."""
    return lambda self, value: vars(self).update({name: value}), lambda self: vars(self).pop(name)


def _slot(module: nn.Module) -> nn.Module | None:
    return module._modules.get("slot")


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _takes(reader: FrameType, module: nn.Module) -> bool:
    """Whether a frame reads a module's tensor to compute with it, inside of a call, and not the module's own call."""
    if f"{_module_of(reader)}.".startswith(_HARMLESS) or _asks(reader.f_code, reader.f_lasti):
        return False
    above: FrameType | None = reader
    while above is not None and above.f_code is not MODULE_CALL:
        above = above.f_back
    return above is not None and above.f_locals.get("self") is not module


@functools.lru_cache(maxsize=256)
def _asks(code: CodeType, at: int) -> bool:
    """Whether what code reads by the instruction at ``at`` is only asked something there."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    # a property that the interpreter has inlined is read at the caches behind the instruction
    here = max(number for number, step in enumerate(steps) if step.offset <= at)
    if not steps[here].opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
        return "hasattr" in code.co_names
    after = steps[here + 1]
    return after.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.argval in ASKS
