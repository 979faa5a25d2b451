"""Which sites an adapter has in a model, and what goes to each; found before anything is changed."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods import method_of
from fxpeft.methods.base import Method, SitePlan
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.methods.lora import LoraConfig, why_not_parted
from fxpeft.methods.tokens import TokenRows
from fxpeft.model.modules import Modules
from fxpeft.model.placement import parted, parted_dimension
from fxpeft.model.replication import check_replicated
from fxpeft.passes.base import PassError, join
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import EXCLUDED, Selection, pattern_table
from fxpeft.passes.targets.regex import shown
from fxpeft.passes.targets.terms import Pattern
from fxpeft.targets.defaults import with_targets
from fxpeft.targets.experts import converted
from fxpeft.targets.parameters import parameter_sites
from fxpeft.targets.resolve import (
    Patterns,
    Roles,
    known_roles,
    parameter_subjects,
    spelled,
    subjects_of,
    with_module_names,
    with_parameter_names,
    with_site_names,
)
from fxpeft.targets.saved import passed_over, with_heads, with_saved
from fxpeft.targets.tokens import one_weight, with_tokens
from fxpeft.targets.tying import check_tied, with_tied_saved, with_tied_targets

NAMED = "exclude_modules names it"  # why a target is left out


@dataclass(frozen=True)
class Targets:
    """What a config means in a model, before its method says what goes to each site.

    Args:
        config: with its defaults filled in as PEFT does, and names in the place of patterns.
        kinds: site -> its kind; modules first, then parameters. wrapped: of the latter, see :class:`SitePlan`.
        saved, tensors, left_out, tied: as in :class:`AdapterPlan`.
    """

    config: AdapterConfig
    kinds: Mapping[str, Kind]
    wrapped: Mapping[str, int]
    saved: Sequence[str]
    tensors: Sequence[str]
    left_out: Mapping[str, str]
    tied: Mapping[str, str]


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
        tokens: module -> the rows of its weight that the adapter brings.
        tied: of the sites and of ``saved``, which has the factors, or the weight, of another: its name.
    """

    config: AdapterConfig
    sites: dict[str, SitePlan]
    saved: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"tokens": {}, "tied": {}, **state})  # older pickles have none


@matching()
def make_plan(
    model: nn.Module | Modules,
    config: AdapterConfig,
    *,
    heads: bool = True,
    roles: Roles | None = None,
    of_file: bool = False,
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
    modules, method = Modules.of(model), method_of(config)
    if ranges := getattr(config, "layer_replication", None):
        check_replicated(modules.model, ranges)
    if not method.targeted:
        config, whole = method.find(modules.model, config)
        config, saved = with_saved(with_heads(config) if heads else config, modules, of_file)
        saved += [name for name in method.copied(config, modules) if name not in saved]
        _check_whole(modules, (), saved)
        config, tokens = with_tokens(config, modules, {*whole, *saved})
        return AdapterPlan(config, whole, saved, tokens=tokens)
    found = find_targets(modules, config, heads=heads, roles=roles, of_file=of_file)
    config = found.config
    if method.ordered and (idle := [name for name, why in found.left_out.items() if why != NAMED]):
        raise AdapterError(
            f"{method.name}: what a site has follows from its place among all targets, and here these do nothing:\n"
            f"{listing(idle)}\nname them in exclude_modules, and train the adapter without them"
        )
    each = {site: method.plan(config, site, kind) for site, kind in found.kinds.items()}
    sites = method.arranged(config, each, modules.model)
    sites |= {site: replace(sites[site], wrapped=count) for site, count in found.wrapped.items()}
    sites |= {n: replace(sites[n], rank=sites[first].rank) for n, first in found.tied.items() if n in sites}
    _check_patterns(config, sites, of_file)
    weights = [join(site, "weight") for site in sites] if method.brings_weight(config) else []
    config, tokens = with_tokens(config, modules, {*sites, *found.saved})
    left_out = dict(found.left_out)
    lists = list(found.saved), list(found.tensors)
    return AdapterPlan(config, sites, *lists, weights, left_out, tokens, dict(found.tied))


@matching()
def find_sites(
    model: nn.Module | Modules,
    targets: str | Pattern | Collection[str],
    *,
    exclude: str | Pattern | Collection[str] | None = None,
    parameters: str | Pattern | Collection[str] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: Literal["none", "all", "lora_only"] = "none",
) -> Targets:
    """The sites that slots are for, whatever adapters come to them: fields of a :class:`~fxpeft.LoraConfig`.

    Raises:
        AdapterError: as :func:`make_plan`.
    """
    modules = Modules.of(model)
    wanted = LoraConfig(
        target_modules=targets, exclude_modules=exclude, target_parameters=parameters,
        modules_to_save=list(modules_to_save) or None, bias=bias,
    )  # fmt: skip
    return find_targets(modules, converted(modules, wanted), heads=False)


def find_targets(
    modules: Modules, config: AdapterConfig, *, heads: bool, roles: Roles | None = None, of_file: bool = False
) -> Targets:
    """A config's defaults, patterns and names to what they mean in a model, each name looked at once.

    Args:
        heads, roles, of_file: as in :func:`make_plan`.

    Raises:
        AdapterError: as :func:`make_plan`.
    """
    method = method_of(config)
    config = copy.deepcopy(config)  # the plan's own from here on
    if heads:
        config = with_heads(config)
    config = with_targets(config, modules)
    config = with_parameter_names(config, modules, roles)
    patterns = Patterns.of(config)
    known = known_roles(modules, patterns.every(), roles)
    subjects = subjects_of(modules, known) if patterns else []
    config = with_module_names(config, patterns, subjects, modules)

    selector = config.selector()
    why_not = {name: selector.why_not(name) for name in modules}
    targets, left_out = [name for name, why in why_not.items() if why is None], dict[str, str]()
    if of_file:
        config, targets, left_out = _without_idle(config, targets, why_not, modules)
    config, targets, followers = with_tied_targets(config, targets, modules)
    if patterns:
        chosen = set(targets)
        sites = [s for s in subjects if s.name in chosen]
        if wanted := getattr(config, "target_parameters", None):
            named = Selection(wanted, "target_parameters")
            sites += [s for s in parameter_subjects(modules, known) if named(s.name)]
        config = with_site_names(config, patterns, sites)
    config = method.resolve(config, modules.model)

    kinds: dict[str, Kind] = {name: _site_kind(name, modules, method, config) for name in [*targets, *followers]}
    if followers:
        check_tied(kinds, targets[0], followers)
    config, beside = with_tied_saved(config, modules)
    config, saved = with_saved(config, modules, of_file)
    saved += [name for name in beside if name not in saved]
    inner = parameter_sites(config, modules, kinds, saved)
    kinds |= {site: each.kind for site, each in inner.items()}
    if not kinds:
        raise AdapterError(_nothing_found(config, why_not))
    tensors = _bias_names(modules, method.bias(config), kinds, saved)
    _check_whole(modules, [*inner, *tensors], saved)
    wrapped = {site: each.wrapped for site, each in inner.items()}
    tied = dict.fromkeys([*followers, *beside], one_weight(modules)[0] if followers or beside else "")
    return Targets(config, kinds, wrapped, saved, tensors, left_out, tied)


def _without_idle(
    config: AdapterConfig, targets: list[str], why_not: Mapping[str, str | None], modules: Modules
) -> tuple[AdapterConfig, list[str], dict[str, str]]:
    """Leave out the targets at which an adapter would do nothing: the config excludes them, and name -> why."""
    idle = {name: why for name in targets if (why := modules.idle(name))}
    out = {name: NAMED for name, why in why_not.items() if why == EXCLUDED} | idle
    if idle:
        given = config.exclude_modules
        exclude = [*given, *idle] if isinstance(given, list) else spelled(list(out), modules)
        config = config.changed(exclude_modules=exclude)
        gone = Selection(list(idle))
        targets = [name for name in targets if not gone(name)]
    return config, targets, out


def _parted(name: str, leaves: list[str], why: str) -> AdapterError:
    return AdapterError(
        f"{name}: tensor parallelism has parted its {' and '.join(leaves)}, and {why}: take it out, or shard the model "
        "with FSDP2, without tp_plan"
    )


def _site_kind(name: str, modules: Modules, method: Method[Any], config: AdapterConfig) -> Kind:
    if why := modules.idle(name):
        raise AdapterError(f"{name}: {why}; add it to exclude_modules")
    if leaves := parted(modules[name]):
        cut = parted_dimension(modules[name])
        if why := why_not_parted(method, config) or (cut if isinstance(cut, str) else None):
            raise _parted(name, leaves, why)
    try:
        return modules.kind(name)
    except PassError as error:
        stacks = [leaf for leaf, p in modules[name]._parameters.items() if p is not None and p.ndim == 3]
        hint = f"; its {' and '.join(stacks)} can be named in target_parameters" if stacks else ""
        raise AdapterError(
            f"{name}: {error}; take it out of target_modules or add it to exclude_modules{hint}"
        ) from None


def _check_whole(modules: Modules, parameters: Iterable[str], saved: Collection[str]) -> None:
    """Refuse parameters of parted modules, and copies of such modules."""
    for path in parameters:
        name, _, leaf = path.rpartition(".")
        if leaves := parted(modules[name]):
            raise _parted(name, leaves, f"{leaf} can't be adapted or trained there")
    copied = frozenset(saved)
    for name in modules if copied else ():
        within = itertools.accumulate(name.split("."), "{}.{}".format)
        if not copied.isdisjoint(within) and (leaves := parted(modules[name])):
            raise _parted(name, leaves, "modules_to_save can't have a copy of it")


def _bias_names(modules: Modules, mode: str, sites: Collection[str], saved: list[str]) -> list[str]:
    if mode == "none":
        return []
    inside = tuple(f"{name}." for name in saved)
    owners = [n for n in modules if (mode == "all" or n in sites) and not f"{n}.".startswith(inside or ("\0",))]
    return [join(n, "bias") for n in owners if isinstance(modules[n]._parameters.get("bias"), nn.Parameter)]


def _check_patterns(config: AdapterConfig, sites: Mapping[str, SitePlan], of_file: bool) -> None:
    """A pattern that matches no site is a typo; PEFT would ignore it silently."""
    for name in config.patterns:
        values = getattr(config, name, None)
        unused = pattern_table(values, name).unmatched(sites) if values else []
        if unused:
            passed_over(f"{name}: {shown(unused[0])} matches none of the adapter's {len(sites)} sites", of_file)


def _nothing_found(config: AdapterConfig, why_not: Mapping[str, str | None]) -> str:
    targets = config.target_modules
    suffixes = sorted({n.rpartition(".")[2] for n in why_not if n})
    assert not isinstance(targets, Pattern)  # a pattern that selects nothing was refused before
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    asked = [w[-100:].rpartition(".")[2] for w in wanted[:20]]
    near = [n for w in asked for n in difflib.get_close_matches(w, suffixes, n=5)]
    skipped = [f"{n}: {why}" for n, why in why_not.items() if n and why not in (None, "matches no target")]
    text = f"no module of the model is a target: target_modules={short(targets)}"
    if skipped:
        text += f"\nmatched but left out:\n{listing(skipped)}"
    return text + f"\nnearest names: {', '.join(dict.fromkeys(near)) or ', '.join(suffixes[:20])}"
