"""``modules_to_save`` meets a model: the modules that an adapter brings whole, and a task's head among them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.model.walk import base_state
from fxpeft.passes.live import base_class
from fxpeft.passes.targets.names import Endings

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def with_heads(config: AdapterConfig) -> AdapterConfig:
    """A config that lets the task's head be trained too."""
    own, saved = HEADS.get(config.task_type or "", ()), config.modules_to_save or []
    return config.changed(modules_to_save=[*saved, *(h for h in own if h not in saved)]) if own else config


def saved_modules(model: nn.Module | Modules, wanted: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` means; ``AdapterError`` where one is missing."""
    return with_saved(AdapterConfig(modules_to_save=list(wanted) or None), Modules.of(model))[1]


def with_saved(config: AdapterConfig, modules: Modules, of_file: bool = False) -> tuple[AdapterConfig, list[str]]:
    """The modules that ``modules_to_save`` means, and the config that means them in PEFT too.

    Args:
        of_file: names that the model lacks are told of and passed over.

    Raises:
        AdapterError: the model has no module of a name; or a list of modules has parameters of its own.
    """
    wanted, heads = config.modules_to_save or [], HEADS.get(config.task_type or "", ())
    ends = Endings(wanted)
    met = {name: set(own) for name in modules if (own := list(ends.of(name)))}  # PEFT: a suffix, dotted or not
    known = set[str]().union(*met.values(), heads)
    missing = [w for w in wanted if w not in known]
    if missing:
        passed_over(f"modules_to_save: no module of the model is named\n{listing(map(short, missing))}", of_file)
    found = [n for n in met if not any(n[:at] in met for at, sign in enumerate(n) if sign == ".")]
    lists = {n: _parts(n, modules) for n in found if isinstance(modules[n], nn.ModuleList | nn.ModuleDict)}
    if lists:  # PEFT takes no module without a forward, but the items of such a list by their names
        used = set[str]().union(*(met[n] for n in found if n not in lists), heads)
        items = (part for parts in lists.values() for part in parts)
        config = config.changed(modules_to_save=[*(w for w in wanted if w in used), *items])
    return config, [part for n in found for part in (lists[n] if n in lists else _parts(n, modules))]


def _parts(name: str, modules: Modules) -> list[str]:
    """The modules that an adapter's copies stand beside: a list of modules has no place for them, but its items have.

    Raises:
        AdapterError: the list has parameters of its own too.
    """
    module = modules[name]
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return [name]
    own = [k for k, v in (*module._parameters.items(), *module._buffers.items()) if v is not None]
    items = [n for n, child in modules.items() if child in module._modules.values()]
    if own:
        raise AdapterError(
            f"modules_to_save: {name} is a {base_class(module).__name__} with {', '.join(own)} of its own, beside "
            "which an adapter's copy would be one more item of the list; name what is to be trained in it:\n"
            f"{listing(items)}"
        )
    return [part for item in items for part in _parts(item, modules) if base_state(modules[part])]


def passed_over(problem: str, of_file: bool) -> None:
    """An error in a new adapter's config; a warning in that of one that was trained."""
    if not of_file:
        raise AdapterError(problem)
    warnings.warn(f"{problem}; it is passed over, as in PEFT", stacklevel=4)
