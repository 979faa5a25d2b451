"""Patterns meet a model: what ``target_modules`` and its neighbours select, as names that PEFT reads too."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.reads import idle
from fxpeft.model.trace import roles
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live import base_class, kind_of
from fxpeft.passes.live.parameters import parameter_kind, parametrized
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.match import module_kind
from fxpeft.passes.targets.names import NameSelector, Selection
from fxpeft.passes.targets.patterns import explain, from_peft, is_pattern, layers_of, pattern, select
from fxpeft.passes.targets.terms import OfRole, Pattern, PatternError, Subject

Roles = Mapping[str, tuple[str, ...]]
_KEYED = ("rank_pattern", "alpha_pattern")


def has_pattern(value: object) -> bool:
    """Whether a field says a pattern, as a whole or in one of its entries."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return any(is_pattern(v) for v in value)
    return is_pattern(value)


def kind_or_none(name: str, modules: Mapping[str, nn.Module]) -> Kind | None:
    """The kind of a module that a rewrite can take, else ``None``."""
    module = modules[name]
    if module_kind(module) is None and (not module._parameters or next(module.children(), None) is not None):
        return None  # a container: tracing it would be tracing the model
    if idle(name, modules):
        return None
    try:
        return kind_of(module)
    except PassError:
        return None


def classes_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Module -> names of its own class and of those around it, bases included."""
    classes: dict[str, tuple[str, ...]] = {}
    for name, module in modules.items():
        around = classes.get(name.rpartition(".")[0], ()) if name else ()
        own = (c.__name__ for c in base_class(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
        classes[name] = tuple(dict.fromkeys((*own, *around)))
    return classes


def subjects_of(modules: Mapping[str, nn.Module], known: Roles) -> list[Subject]:
    """Every module that a rewrite can take or that has a role."""
    layers, classes = layers_of(list(modules)), classes_of(modules)
    found = []
    for name in modules:
        kind = kind_or_none(name, modules) if name else None
        if kind is not None or name in known:
            found.append(Subject(name, kind, classes[name], known.get(name, ()), layers.get(name)))
    return found


def parameter_subjects(modules: Mapping[str, nn.Module], known: Roles) -> list[Subject]:
    """Every parameter that an update can be added to, with its module's classes, roles and layer."""
    layers, classes = layers_of(list(modules)), classes_of(modules)
    found = []
    for name, module in modules.items():
        for leaf in (*module._parameters, *parametrized(module)):
            try:
                kind = parameter_kind(module, leaf)
            except PassError:
                continue
            found.append(Subject(join(name, leaf), kind, classes[name], known.get(name, ()), layers.get(name)))
    return found


def resolve_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], config: AdapterConfig, known: Roles | None = None
) -> None:
    """Replace a pattern or regular expression in ``target_parameters`` by the names that it selects, in place.

    Raises:
        AdapterError: it selects nothing, or needs a trace that fails.
    """
    wanted = getattr(config, "target_parameters", None)
    if not wanted or not (isinstance(wanted, str) or has_pattern(wanted)):
        return
    asked = from_peft(wanted)
    if known is None:
        known = roles(model) if any(isinstance(term, OfRole) for term in asked.terms()) else {}
    subjects = parameter_subjects(modules, known)
    names = [s.name for s in select(asked, subjects, "target_parameters")]
    if not names:
        raise AdapterError(_nothing("target_parameters", asked, subjects))
    named, own = Selection(names), set(names)
    more = [s.name for s in subjects if named(s.name) and s.name not in own]
    if more:
        raise AdapterError(
            f"target_parameters={short(str(asked))}: PEFT reads the names that it selects as ends of names, which "
            f"would take these too:\n{listing(more)}\nselect them as well, or rename the module"
        )
    config.target_parameters = names  # type: ignore[attr-defined]


def resolve_patterns(
    model: nn.Module, modules: Mapping[str, nn.Module], config: AdapterConfig, known: Roles | None = None
) -> AdapterConfig:
    """Replace the patterns of a config, in place, by the names that they select; PEFT's forms stay as they are.

    Args:
        modules: the base's modules, named.
        known: roles where they are known; the model is traced otherwise, if a pattern asks for a role.

    Raises:
        AdapterError: a pattern selects nothing (the nearest names are listed), or needs a trace that fails.
    """
    targets, exclude = config.target_modules, config.exclude_modules
    keyed = [name for name in _KEYED if any(is_pattern(key) for key in getattr(config, name, None) or {})]
    inner = getattr(config, "feedforward_modules", None)  # IA3's
    if not (has_pattern(targets) or has_pattern(exclude) or keyed or has_pattern(inner)):
        return config
    assert targets is not None
    wanted, unwanted = from_peft(targets), from_peft(exclude or ())
    keys = {name: {key: pattern(key) for key in getattr(config, name) if is_pattern(key)} for name in keyed}
    try:
        within = from_peft(inner) if has_pattern(inner) and inner is not None else None
    except PatternError as error:
        raise AdapterError(f"feedforward_modules: {error}") from None
    every = [wanted, unwanted, *(p for own in keys.values() for p in own.values())]
    every += [] if within is None else [within]
    if known is None:
        asked = any(isinstance(term, OfRole) for each in every for term in each.terms())
        known = roles(model) if asked else {}
    subjects = subjects_of(modules, known)
    if has_pattern(targets) or has_pattern(exclude):
        if has_pattern(targets):
            names = [s.name for s in select(wanted, subjects, "target_modules")]
        else:
            bare = NameSelector(targets, (), (), *config.layer_filter())  # type: ignore[arg-type]
            names = bare.select(modules)
        if not names:
            raise AdapterError(_nothing("target_modules", wanted, subjects))
        if has_pattern(exclude):
            out = {s.name for s in select(unwanted, subjects, "exclude_modules")}
            if not out:
                raise AdapterError(_nothing("exclude_modules", unwanted, subjects))
            if out >= set(names):
                raise AdapterError(f"exclude_modules={short(str(unwanted))} leaves out all of\n{listing(names)}")
            names, config.exclude_modules = [n for n in names if n not in out], None
        config.target_modules = spelled(names, modules)
        config.layers_to_transform = config.layers_pattern = None
    own = NameSelector(config.target_modules, config.exclude_modules or (), (), *config.layer_filter())  # type: ignore[arg-type]
    chosen = [s for s in subjects if own(s.name)]
    if parameters := getattr(config, "target_parameters", None):
        named = Selection(parameters, "target_parameters")
        chosen += [s for s in parameter_subjects(modules, known) if named(s.name)]
    for name in keyed:
        setattr(config, name, _by_name(name, getattr(config, name), keys[name], chosen))
    if within is not None:
        names = [s.name for s in select(within, chosen, "feedforward_modules")]
        if not names:
            raise AdapterError(_nothing("feedforward_modules", within, chosen))
        # PEFT reads a list's entries as ends of names; a regular expression says exactly these
        config.feedforward_modules = "|".join(re.escape(name) for name in names)  # type: ignore[attr-defined]
    return config


def spelled(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """Full names as PEFT reads them: a list, or a regular expression where the list's suffixes would take more."""
    if NameSelector(list(names)).select(modules) == list(names):
        return list(names)
    return "|".join(re.escape(name) for name in names)


def _by_name(
    where: str, values: Mapping[str, object], patterns: Mapping[str, Pattern], chosen: Sequence[Subject]
) -> dict[str, object]:
    """``rank_pattern`` with its patterns written out, each site's full name in place of the pattern."""
    out: dict[str, object] = {}
    for key, value in values.items():
        if key not in patterns:
            out[key] = value
            continue
        sites = [s.name for s in select(patterns[key], chosen, where)]
        if not sites:
            raise AdapterError(_nothing(where, patterns[key], chosen))
        out.update({f"^{re.escape(site)}": value for site in sites if f"^{re.escape(site)}" not in out})
    return out


def _nothing(where: str, wanted: Pattern, subjects: Sequence[Subject]) -> str:
    lines = explain(wanted, subjects) or ["each term matches some site, but no site matches all of them"]
    return f"{where}={short(str(wanted))} selects nothing:\n{listing(lines)}"
