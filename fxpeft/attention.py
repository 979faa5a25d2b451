"""A model's query and value projections, whatever they are called, for configs that name no targets."""

from __future__ import annotations

from torch import nn

from fxpeft.errors import AdapterError
from fxpeft.passes.names import NameSelector
from fxpeft.trace import roles

_TAKEN = {f"{kind}.{part}" for kind in ("attention", "cross_attention") for part in ("query", "value", "qkv", "kv")}


def attention_targets(model: nn.Module) -> list[str]:
    """Names of the modules that project an attention's queries and values, fused ones included.

    Suffixes where they select the same modules, full names otherwise; nothing where the model can't
    be traced or has no attention.
    """
    try:
        known = roles(model)
    except AdapterError:
        return []
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if _TAKEN.intersection(known.get(name, ()))]
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return suffixes if sorted(NameSelector(suffixes).select(names)) == sorted(found) else found
