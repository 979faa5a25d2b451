"""Let every call of a prepared model, and of its parts, take the model's swap lock."""

from __future__ import annotations

import copy
import sys
import time
from _thread import get_ident
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from fxpeft.adapters.lock import SwapLock
from fxpeft.adapters.state import find_state
from fxpeft.errors import LockTimeout
from fxpeft.model.wrappers import faces, named_modules, submodule
from fxpeft.passes.live import Container, lock_module, unlock_module
from fxpeft.passes.live.locked import LOCK
from fxpeft.passes.torch_private import MODULE_CALL, pytree


class ModelLock(SwapLock):
    """The lock of a model, which knows what a copy of it has to copy."""

    #: what gives the rows of a call the adapters that it names; :mod:`fxpeft.serving.rows` has it
    naming: ClassVar[Callable[..., AbstractContextManager[None]]]

    def snapshot(self, module: nn.Module) -> nn.Module | None:
        """A copy of a locked module as of one moment, to be pickled in its place; ``None`` where nobody swaps.

        It shares what no swap writes, the base's and adapters' tensors.
        """
        if self.sealed:
            return None
        with self.read():
            memo: dict[int, Any] = {}
            slots = {id(t) for part in module.modules() for t in _slot_tensors(part)}
            for part in module.modules():
                for value in (*part._parameters.values(), *part._buffers.values(), vars(part).get("_hf_hook")):
                    if value is not None and id(value) not in slots:
                        memo[id(value)] = value
            state = find_state(module)
            for adapter in () if state is None else state.adapters.values():
                held = [[*adapter.values.flat().values()], {**adapter.lowered}, adapter.prompt]
                memo.update({id(t): t for t in pytree.tree_leaves(held) if isinstance(t, Tensor)})
                memo[id(adapter.room)] = adapter.room
            twin: nn.Module = copy.deepcopy(module, memo)
            vars(twin)[LOCK].sealed = True
            return twin


def guard_forwards(model: nn.Module, lock: ModelLock, hosts: Collection[str]) -> None:
    """Lock the modules that have slots and all modules around them: each may be called on its own.

    Args:
        hosts: names of the modules with slots.
    """
    named = dict(named_modules(model, remove_duplicate=False))
    own = {id(named[name]) for name in hosts}
    around = {""}
    for name, module in named.items():
        if id(module) in own:
            while name:
                around.add(name)
                name = name.rpartition(".")[0]
    parts = {id(part): part for part in map(named.__getitem__, around)}
    parts |= {id(part): part for face in faces(model)[1:] for part in (submodule(face, name) for name in around)}
    for module in parts.values():
        if type(module).forward is not nn.Module.forward:  # a list of modules isn't called
            lock_module(module, lock)


def unguard_forwards(model: nn.Module) -> None:
    """The inverse of :func:`guard_forwards`. Calls that wait for the lock go on with what the modules are then."""
    for face in faces(model):
        for module in face.modules():
            if LOCK in vars(module):
                unlock_module(module)


def drain(model: nn.Module, lock: SwapLock, hosts: Collection[str]) -> None:
    """Wait for calls of these modules that began before they were locked.

    Raises:
        LockTimeout: they took too long.
    """
    parts = {id(submodule(model, name)) for name in hosts}
    deadline = time.monotonic() + lock.timeout
    while _inside(parts, {get_ident(), *tuple(lock.waiting.values())}):
        if time.monotonic() > deadline:
            raise LockTimeout(f"a forward that began before prepare_hotswap took longer than {lock.timeout:g} seconds")
        time.sleep(0.001)


def _inside(parts: Collection[int], besides: Collection[int]) -> bool:
    """Whether a thread, ``besides`` these, is in a call of one of the modules."""
    for thread, top in sys._current_frames().items():
        frame = None if thread in besides else top
        while frame is not None:
            if frame.f_code is MODULE_CALL and id(frame.f_locals.get("self")) in parts:
                return True
            frame = frame.f_back
    return False


def _slot_tensors(module: nn.Module) -> list[Tensor]:
    slot = module._modules.get("slot")
    return [*slot.parameters(), *slot.buffers()] if isinstance(slot, Container) else []
