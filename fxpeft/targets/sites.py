"""Which sites an adapter has in a model, and what goes to each; made before anything is changed."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods import method_of
from fxpeft.methods.base import SitePlan
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.model.reads import idle
from fxpeft.model.walk import base_modules, base_state, embedding_layer
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live import base_class, kind_of
from fxpeft.passes.targets.names import EXCLUDED, Endings, PatternTable
from fxpeft.passes.targets.regex import shown
from fxpeft.passes.targets.terms import Pattern
from fxpeft.targets.defaults import default_targets, usual_targets
from fxpeft.targets.parameters import parameter_sites
from fxpeft.targets.resolve import Roles, resolve_parameters, resolve_patterns, spelled

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass
class AdapterPlan:
    """What one adapter puts where: what it is made by, and holds. :class:`fxpeft.Plan` is the one for people to read.

    Args:
        sites: site name -> rank, scaling and kind there.
        saved: modules that the adapter brings whole (``modules_to_save``); in the place of a list of modules,
            those that are in it.
        tensors: single parameters that it brings (``bias``): dotted names in the base model.
        weights: the same, of weights that follow from the base's and are in no checkpoint.
        left_out: module -> why a file's tensors for it are left out: nothing would read them, or ``exclude_modules``.
    """

    config: AdapterConfig
    sites: dict[str, SitePlan]
    saved: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@matching()
def make_plan(
    model: nn.Module, config: AdapterConfig, *, heads: bool = True, roles: Roles | None = None, of_file: bool = False
) -> AdapterPlan:
    """Find an adapter's sites in a model; the plan's config has its defaults filled in as PEFT does.

    Args:
        heads: let ``task_type`` add the model's head to ``modules_to_save``. A checkpoint's config
            has it there already.
        roles: what the modules do, where that is known; else the model is traced if a pattern asks.
        of_file: the config came with tensors: targets where they would do nothing are left out, as whoever
            trained them got nothing from them, and the plan's config excludes them. Patterns of ranks that no site
            has and modules_to_save that the model lacks are told of, as PEFT passes over them; for a new adapter
            they are typos.

    Raises:
        AdapterError: no site was found, a pattern matches nothing, or a target can't be rewritten.
    """
    modules, method = dict(base_modules(model)), method_of(config)
    if not method.targeted:
        config, whole = method.find(model, config)
        config = _with_heads(config, heads)
        return AdapterPlan(config, whole, _saved(modules, config, of_file))
    config = _resolve(model, modules, config, heads, roles)
    left_out = _leave_out(modules, config) if of_file else {}
    selector = config.selector()
    sites: dict[str, SitePlan] = {}
    for name in selector.select(modules):
        sites[name] = method.plan(config, name, _site_kind(name, modules))
    saved = _saved(modules, config, of_file)
    sites |= parameter_sites(modules, config, sites, saved)
    if not sites:
        raise AdapterError(_nothing_found(config, modules))
    _check_patterns(config, sites, of_file)
    weights = [join(site, "weight") for site in sites] if method.brings_weight(config) else []
    tensors = _bias_names(modules, method.bias(config), sites, saved)
    return AdapterPlan(config, sites, saved, tensors, weights, left_out)


def _leave_out(modules: dict[str, nn.Module], config: AdapterConfig) -> dict[str, str]:
    """Targets that an adapter would do nothing at, from now on excluded, and what was excluded before: name -> why."""
    selector = config.selector()
    found = {name: why for name in selector.select(modules) if (why := idle(name, modules))}
    out = {n: "exclude_modules names it" for n in modules if selector.why_not(n) == EXCLUDED} | found
    if found:
        given = config.exclude_modules
        config.exclude_modules = [*given, *found] if isinstance(given, list) else spelled(list(out), modules)
    return out


def _resolve(
    model: nn.Module, modules: dict[str, nn.Module], config: AdapterConfig, heads: bool, roles: Roles | None
) -> AdapterConfig:
    config = _with_heads(copy.deepcopy(config), heads)
    if config.target_modules is None and getattr(config, "target_parameters", None):
        config.target_modules = usual_targets(model) or []
    elif config.target_modules is None:
        config.target_modules = default_targets(model, method_of(config).name)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = all_linear(model, modules, config.task_type)
    resolve_parameters(model, modules, config, roles)
    resolve_patterns(model, modules, config, roles)
    method_of(config).resolve(config, model)
    return config


def _with_heads(config: AdapterConfig, heads: bool) -> AdapterConfig:
    """Let the task's head be trained too."""
    own = HEADS.get(config.task_type or "", ()) if heads else ()
    if own:
        saved = config.modules_to_save or []
        config.modules_to_save = [*saved, *(h for h in own if h not in saved)]
    return config


def all_linear(model: nn.Module, modules: dict[str, nn.Module], task_type: str | None) -> list[str]:
    """Every linear module but the output head, as PEFT's ``all-linear``, and but those that nothing calls."""
    head: Any = embedding_layer(model, "output") if isinstance(model, PreTrainedModel) else None
    if head is None and task_type == "SEQ_CLS":
        head = next((getattr(model, h) for h in HEADS["SEQ_CLS"] if hasattr(model, h)), None)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not idle(name, modules)
    ]


def _site_kind(name: str, modules: dict[str, nn.Module]) -> Any:
    if why := idle(name, modules):
        raise AdapterError(f"{name}: {why}; add it to exclude_modules")
    try:
        return kind_of(modules[name])
    except PassError as error:
        stacks = [leaf for leaf, p in modules[name]._parameters.items() if p is not None and p.ndim == 3]
        hint = f"; its {' and '.join(stacks)} can be named in target_parameters" if stacks else ""
        raise AdapterError(
            f"{name}: {error}; take it out of target_modules or add it to exclude_modules{hint}"
        ) from None


def saved_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` means; ``AdapterError`` where one is missing."""
    return _saved(dict(base_modules(model)), AdapterConfig(modules_to_save=list(wanted) or None))


def _saved(modules: dict[str, nn.Module], config: AdapterConfig, loading: bool = False) -> list[str]:
    wanted = config.modules_to_save or []
    ends = Endings(wanted)
    found = [n for n in modules if ends(n)]  # PEFT: a suffix, dotted or not
    met = {end for n in found for end in ends.of(n)}.union(HEADS.get(config.task_type or "", ()))
    missing = [w for w in wanted if w not in met]
    if missing:
        _tell(f"modules_to_save: no module of the model is named\n{listing(map(short, missing))}", loading)
    around = set(found)
    found = [n for n in found if not any(n[:at] in around for at, sign in enumerate(n) if sign == ".")]
    lists = {n: _parts(n, modules) for n in found if isinstance(modules[n], nn.ModuleList | nn.ModuleDict)}
    if lists:  # PEFT takes no module without a forward, but the items of such a list by their names
        heads = HEADS.get(config.task_type or "", ())
        used = {end for n in found if n not in lists for end in ends.of(n)}.union(heads)
        config.modules_to_save = [
            *(w for w in wanted if w in used), *(part for parts in lists.values() for part in parts),
        ]  # fmt: skip
    return [part for n in found for part in _parts(n, modules)]


def _parts(name: str, modules: dict[str, nn.Module]) -> list[str]:
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


def _bias_names(modules: dict[str, nn.Module], mode: str, sites: dict[str, SitePlan], saved: list[str]) -> list[str]:
    if mode == "none":
        return []
    inside = tuple(f"{name}." for name in saved)
    owners = [n for n in modules if (mode == "all" or n in sites) and not f"{n}.".startswith(inside or ("\0",))]
    return [join(n, "bias") for n in owners if isinstance(modules[n]._parameters.get("bias"), nn.Parameter)]


def _check_patterns(config: AdapterConfig, sites: dict[str, SitePlan], loading: bool) -> None:
    """A pattern that matches no site is a typo; PEFT would ignore it silently."""
    for name in config.patterns:
        unused = PatternTable(getattr(config, name, None) or {}, name).unmatched(sites)
        if unused:
            _tell(f"{name}: {shown(unused[0])} matches none of the adapter's {len(sites)} sites", loading)


def _tell(problem: str, loading: bool) -> None:
    """An error in a new adapter's config; a warning in that of one that was trained."""
    if not loading:
        raise AdapterError(problem)
    warnings.warn(f"{problem}; it is passed over, as in PEFT", stacklevel=4)


def _nothing_found(config: AdapterConfig, modules: dict[str, nn.Module]) -> str:
    targets = config.target_modules
    suffixes = sorted({n.rpartition(".")[2] for n in modules if n})
    assert not isinstance(targets, Pattern)  # a pattern that selects nothing was refused before
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    asked = [w[-100:].rpartition(".")[2] for w in wanted[:20]]
    near = [n for w in asked for n in difflib.get_close_matches(w, suffixes, n=5)]
    selector = config.selector()
    reasons = ((n, selector.why_not(n)) for n in modules if n)
    skipped = [f"{n}: {why}" for n, why in reasons if why not in (None, "matches no target")]
    text = f"no module of the model is a target: target_modules={short(targets)}"
    if skipped:
        text += f"\nmatched but left out:\n{listing(skipped)}"
    return text + f"\nnearest names: {', '.join(dict.fromkeys(near)) or ', '.join(suffixes[:20])}"
