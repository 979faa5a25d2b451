"""What belongs to an instance and what to its class: forwards that others set, and the class without its rewrite."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import nn

from fxpeft.passes.live.locked import unlocked
from fxpeft.passes.rewrite.feed import LEAF

# what a locked module runs whose instance somebody gave a forward
CALL_GIVEN = f"def forward(self, *args, **kwargs):\n    return self.{LEAF}(*args, **kwargs)\n"
DIFFUSERS = "_diffusers_hook"  # where its hooks stand
_rebased: weakref.WeakValueDictionary[tuple[str, tuple[type, ...]], type[nn.Module]] = weakref.WeakValueDictionary()


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its rewrite."""
    cls = unlocked(type(module))
    return vars(cls)["_fxpeft_base"] if "_fxpeft_base" in vars(cls) else _without_rewrite(cls)


def _without_rewrite(cls: type[nn.Module]) -> type[nn.Module]:
    """A class that somebody made of a generated one, as FSDP2 does of a module's, made of the class below that one."""
    if not hasattr(cls, "_fxpeft_base"):
        return cls
    below = [(base, vars(base).get("_fxpeft_base") or _without_rewrite(base)) for base in cls.__bases__]
    name, bases = cls.__name__, tuple(base for _, base in below)
    for generated, base in below:
        name = name.replace(generated.__name__, base.__name__)
    found = _rebased.get((name, bases))
    if found is None:
        members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        found = _rebased.setdefault((name, bases), type(name, bases, members))
    return found


def is_bound(module: nn.Module) -> bool:
    """Whether a module runs a generated forward."""
    return getattr(type(module), "_fxpeft_source", CALL_GIVEN) != CALL_GIVEN


def given_forward(module: nn.Module) -> Any:
    """The forward that somebody gave this instance in place of its class's, or ``None``."""
    state = vars(module)
    if LEAF in state:
        return state[LEAF]
    found = hooked_forward(module) if is_hooked(module) else state.get("forward")
    return None if is_own(module, found) else found


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of accelerate's or diffusers' stand on the instance in place of its forward, and call that."""
    return "_old_forward" in vars(module) or _reference(module) is not None


def hooked_forward(module: nn.Module) -> Any:
    """The forward that the hooks of an instance call."""
    state, reference = vars(module), _reference(module)
    if "_old_forward" in state:
        return state["_old_forward"]
    return reference.forward if reference.original_forward is None else reference.original_forward


def set_hooked_forward(module: nn.Module, forward: Any) -> None:
    """Let the hooks of an instance call another forward."""
    state, reference = vars(module), _reference(module)
    if "_old_forward" in state:
        state["_old_forward"] = forward
    elif reference.original_forward is None:
        reference.forward = forward
    else:
        reference.original_forward = forward


def _reference(module: nn.Module) -> Any:
    """What the first of diffusers' hooks calls; the others call it."""
    references = getattr(vars(module).get(DIFFUSERS), "_fn_refs", None)
    return references[0] if references and "forward" in vars(module) else None


def named_forward(module: nn.Module) -> Any:
    """What a module runs, or, where that takes whatever it is given, the first forward behind it whose arguments have
    names: a wrapper ``forward(*args, **kwargs)`` hands them on."""
    behind = (vars(cls)["forward"].__get__(module) for cls in base_class(module).__mro__ if "forward" in vars(cls))
    own = given_forward(module) or base_class(module).forward.__get__(module)
    named = (f for f in (own, *behind) if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
             for p in inspect.signature(f).parameters.values()))  # fmt: skip
    return next(named, own)


def is_own(module: nn.Module, forward: Any) -> bool:
    """Whether a bound method is the class's own: accelerate leaves one on the instance."""
    cls = type(module)
    return getattr(forward, "__func__", None) in (cls.forward, unlocked(cls).forward, base_class(module).forward)
