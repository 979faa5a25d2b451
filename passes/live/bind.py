"""Binding: a module runs a generated forward, and gets its own class back.

A module is traced on its own, its leaf graph is rewritten, and the generated code becomes the
``forward`` of a generated subclass of the module's own class. The instance is then moved to that
class, as torch's parametrize and FSDP2 do: names, hooks, ``isinstance`` and state_dict keys of the
base survive, and moving it back restores it exactly. Classes are cached by their source, so all
sites of one kind share one, and per-layer compilation keeps one graph.

A pickle of a bound module holds its source, which un-pickling runs, as un-pickling runs any code that a pickle
names: for files that you wrote, never for a stranger's.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxpeft.passes.container import Container
from fxpeft.passes.live.generated import generated_class
from fxpeft.passes.live.instance import (
    CALL_GIVEN,
    DIFFUSERS,
    base_class,
    given_forward,
    hooked_forward,
    is_bound,
    is_hooked,
    is_own,
    set_hooked_forward,
)
from fxpeft.passes.live.locked import LOCK, Lock, move, unlocked
from fxpeft.passes.rewrite.feed import LEAF
from fxpeft.passes.torch_private import FSDP


def bind_source(module: nn.Module, source: str, mixin: type | None = None) -> None:
    """Move a module to the generated subclass whose ``forward`` is defined by ``source``."""
    base = base_class(module)
    state = vars(module)
    _drop_autocast(module)
    given, hooked = given_forward(module), is_hooked(module)
    if "forward" in state and not hooked and (LEAF not in state or is_own(module, state["forward"])):
        del state["forward"]  # let the class's forward run
    if given is not None:
        state[LEAF] = given  # called as a leaf: this is where the generated code looks for it
    move(module, generated_class(base, source, mixin))
    if hooked:  # hooks call this bound method; give it the new class's
        set_hooked_forward(module, type(module).forward.__get__(module))


def unbind(module: nn.Module) -> None:
    """Give a module its own class back; the inverse of every bind before."""
    if is_bound(module):
        _unbind(module)


def _unbind(module: nn.Module) -> None:
    state = vars(module)
    _drop_autocast(module)
    hooked = is_hooked(module)
    if not hooked and is_own(module, state.get("forward")):
        del state["forward"]
    move(module, base_class(module))
    given = state.pop(LEAF, None)
    if hooked:
        set_hooked_forward(module, given or type(module).forward.__get__(module))
    elif given is not None:
        state["forward"] = given


def lock_module(module: nn.Module, lock: Lock) -> None:
    """Let every call of a module hold a lock, bound anew or not; see :mod:`fxpeft.passes.live.locked`."""
    if given_forward(module) is not None and not is_bound(module):
        bind_source(module, CALL_GIVEN)
    vars(module)[LOCK] = lock
    change_class(module, type(module))


def unlock_module(module: nn.Module) -> None:
    """The inverse of :func:`lock_module`."""
    del vars(module)[LOCK]
    change_class(module, unlocked(type(module)))
    if getattr(type(module), "_fxpeft_source", None) == CALL_GIVEN:
        _unbind(module)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, with bound methods of the old one that hooks left on the instance."""
    state = vars(module)
    hooked = is_hooked(module)
    kept = hooked and is_own(module, hooked_forward(module))
    if not hooked and is_own(module, state.get("forward")):
        del state["forward"]
    move(module, cls)
    if kept:
        set_hooked_forward(module, type(module).forward.__get__(module))


def _drop_autocast(module: nn.Module) -> None:
    """Drop the autocast that accelerate wrapped around a generated forward: it would go on calling that one."""
    state = vars(module)
    if is_bound(module) and "forward" in state and is_own(module, state.get("_original_forward")):
        del state["forward"], state["_original_forward"]


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the base module: no rewrite, no containers, no hooks."""
    shared = (vars(part).get(name) for part in module.modules() for name in ("_hf_hook", DIFFUSERS))
    memo: dict[int, Any] = {id(hook): hook for hook in shared if hook is not None}  # it may hold all weights
    added = (child for part in module.modules() for child in part._modules.values())
    memo |= {id(child): Container() for child in added if isinstance(child, Container)}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        if LOCK in vars(part):
            unlock_module(part)
        unbind(part)
        _unhook(part)
        for name in [n for n, child in part._modules.items() if isinstance(child, Container)]:
            del part._modules[name]
    return copied


def _unhook(module: nn.Module) -> None:
    """Take hooks and FSDP's mark off a copy, which has weights of its own to compute with."""
    state = vars(module)
    if is_hooked(module) and DIFFUSERS in state:
        forward = hooked_forward(module)
        del state["forward"]
        if not is_own(module, forward):
            state["forward"] = forward
    state.pop(DIFFUSERS, None)
    state.pop("_hf_hook", None)
    state.pop(FSDP, None)
    if "_old_forward" in state:
        forward = state.pop("_old_forward")
        state.pop("forward", None)
        if not is_own(module, forward):
            state["forward"] = forward
