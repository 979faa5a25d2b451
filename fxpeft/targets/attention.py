"""A model's query and value projections, whatever they are called, for configs that name no targets."""

from __future__ import annotations

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.model.reads import idle
from fxpeft.model.trace import roles
from fxpeft.model.wrappers import named_modules
from fxpeft.passes.targets.names import NameSelector

_TAKEN = {f"{kind}.{part}" for kind in ("attention", "cross_attention") for part in ("query", "value", "qkv", "kv")}


def attention_targets(model: nn.Module) -> list[str]:
    """Names of the modules that project an attention's queries and values, fused ones included.

    Suffixes where they select the same modules, full names otherwise; nothing where the model can't
    be traced, has no attention, or one that reads their weights without calling them.
    """
    try:
        known = roles(model)
    except AdapterError:
        return []
    modules = dict(named_modules(model))
    names = list(modules)
    found = [name for name in names if _TAKEN.intersection(known.get(name, ())) and _can_adapt(name, modules)]
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return suffixes if sorted(NameSelector(suffixes).select(names)) == sorted(found) else found


def _can_adapt(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the projection is a module's own: an attention that reads its weights projects itself."""
    return next(modules[name].children(), None) is None and not idle(name, modules)
