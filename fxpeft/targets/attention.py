"""A model's query and value projections, whatever they are called, for configs that name no targets."""

from __future__ import annotations

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.model.modules import Modules
from fxpeft.model.trace import roles
from fxpeft.passes.targets.names import NameSelector

_TAKEN = {f"{kind}.{part}" for kind in ("attention", "cross_attention") for part in ("query", "value", "qkv", "kv")}


def attention_targets(model: nn.Module | Modules) -> list[str]:
    """Names of the modules that project an attention's queries and values, fused ones included.

    Suffixes where they select the same modules, full names otherwise; nothing where the model can't
    be traced, has no attention, or one that reads their weights without calling them.
    """
    modules = Modules.of(model)
    try:
        known = roles(modules.model)
    except AdapterError:
        return []
    found = [name for name in modules if _TAKEN.intersection(known.get(name, ())) and _can_adapt(name, modules)]
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return suffixes if sorted(NameSelector(suffixes).select(modules)) == sorted(found) else found


def _can_adapt(name: str, modules: Modules) -> bool:
    """Whether the projection is a module's own: an attention that reads its weights projects itself."""
    return modules.is_leaf(name) and not modules.idle(name)
