"""Patterns meet a model: what ``target_modules`` and its neighbours select, as names that PEFT reads too.

Every step takes a config and gives one, so that :func:`fxpeft.targets.sites.find_targets` reads from top to bottom.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.model.trace import roles
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live import base_class
from fxpeft.passes.live.parameters import parameter_kind, parametrized
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.match import module_kind
from fxpeft.passes.targets.names import NameSelector, Selection
from fxpeft.passes.targets.patterns import explain, from_peft, is_pattern, layers_of, pattern, select
from fxpeft.passes.targets.terms import OfRole, Pattern, PatternError, Subject

C = TypeVar("C", bound=AdapterConfig)
Roles = Mapping[str, tuple[str, ...]]
_KEYED = ("rank_pattern", "alpha_pattern")


def has_pattern(value: object) -> bool:
    """Whether a field says a pattern, as a whole or in one of its entries."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return any(is_pattern(v) for v in value)
    return is_pattern(value)


@dataclass(frozen=True)
class Patterns:
    """The patterns that a config's fields about modules and sites say.

    Args:
        targets, exclude: ``None`` where the field says none. keyed: field -> its keys that are patterns.
        feedforward: IA3's ``feedforward_modules``.
    """

    targets: Pattern | None
    exclude: Pattern | None
    keyed: Mapping[str, Mapping[str, Pattern]]
    feedforward: Pattern | None

    @classmethod
    def of(cls, config: AdapterConfig) -> Patterns:
        """Those of a config whose ``target_modules`` are there."""
        inner = getattr(config, "feedforward_modules", None)
        keyed = {
            name: own
            for name in _KEYED
            if (own := {key: pattern(key) for key in getattr(config, name, None) or {} if is_pattern(key)})
        }
        targets, exclude = (_read(value) for value in (config.target_modules, config.exclude_modules))
        try:
            return cls(targets, exclude, keyed, _read(inner))
        except PatternError as error:
            raise AdapterError(f"feedforward_modules: {error}") from None

    def __bool__(self) -> bool:
        return any(True for _ in self.every())

    def every(self) -> Iterable[Pattern]:
        """All of them."""
        keyed = (each for own in self.keyed.values() for each in own.values())
        found = (self.targets, self.exclude, *keyed, self.feedforward)
        return (each for each in found if each is not None)


def _read(value: str | Pattern | Collection[str] | None) -> Pattern | None:
    return from_peft(value) if value is not None and has_pattern(value) else None


def known_roles(modules: Modules, patterns: Iterable[Pattern], known: Roles | None) -> Roles:
    """The modules' roles as far as the patterns ask for them: the model is traced where one does.

    Args:
        known: where they are known already.
    """
    if known is not None:
        return known
    return roles(modules.model) if any(isinstance(term, OfRole) for each in patterns for term in each.terms()) else {}


def kind_or_none(name: str, modules: Modules) -> Kind | None:
    """The kind of a module that a rewrite can take, else ``None``."""
    module = modules[name]
    if module_kind(module) is None and (not module._parameters or not modules.is_leaf(name)):
        return None  # a container: tracing it would be tracing the model
    if modules.idle(name):
        return None
    try:
        return modules.kind(name)
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


def subjects_of(modules: Modules, known: Roles) -> list[Subject]:
    """Every module that a rewrite can take or that has a role."""
    layers, classes = layers_of(list(modules)), classes_of(modules)
    found = []
    for name in modules:
        kind = kind_or_none(name, modules) if name else None
        if kind is not None or name in known:
            found.append(Subject(name, kind, classes[name], known.get(name, ()), layers.get(name)))
    return found


def parameter_subjects(modules: Modules, known: Roles) -> list[Subject]:
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


def with_parameter_names(config: C, modules: Modules, known: Roles | None = None) -> C:
    """A config with names in the place of a pattern or regular expression in ``target_parameters``.

    Raises:
        AdapterError: it selects nothing, or needs a trace that fails.
    """
    wanted = getattr(config, "target_parameters", None)
    if not wanted or not (isinstance(wanted, str) or has_pattern(wanted)):
        return config
    asked = from_peft(wanted)
    subjects = parameter_subjects(modules, known_roles(modules, [asked], known))
    names = [s.name for s in select(asked, subjects, "target_parameters")]
    if not names:
        raise AdapterError(_nothing("target_parameters", asked, subjects))
    named, own = Selection(names), set(names)
    more = [s.name for s in subjects if s.name not in own and named(s.name)]
    if more:
        raise AdapterError(
            f"target_parameters={short(str(asked))}: PEFT reads the names that it selects as ends of names, which "
            f"would take these too:\n{listing(more)}\nselect them as well, or rename the module"
        )
    return config.changed(target_parameters=names)


def with_module_names(config: C, patterns: Patterns, subjects: Sequence[Subject], modules: Modules) -> C:
    """A config with names in the place of the patterns that say which modules are targets; PEFT's forms stay.

    Args:
        subjects: the model's modules; see :func:`subjects_of`.

    Raises:
        AdapterError: a pattern selects nothing; the nearest names are listed.
    """
    if patterns.targets is None and patterns.exclude is None:
        return config
    if patterns.targets is not None:
        names = [s.name for s in select(patterns.targets, subjects, "target_modules")]
    else:
        names = NameSelector(config.target_modules, (), (), *config.layer_filter()).select(modules)  # type: ignore[arg-type]
    if not names:
        assert config.target_modules is not None
        raise AdapterError(_nothing("target_modules", from_peft(config.target_modules), subjects))
    exclude = config.exclude_modules
    if patterns.exclude is not None:
        out = {s.name for s in select(patterns.exclude, subjects, "exclude_modules")}
        if not out:
            raise AdapterError(_nothing("exclude_modules", patterns.exclude, subjects))
        if out >= set(names):
            raise AdapterError(f"exclude_modules={short(str(patterns.exclude))} leaves out all of\n{listing(names)}")
        names, exclude = [n for n in names if n not in out], None
    return config.changed(
        target_modules=spelled(names, modules), exclude_modules=exclude, layers_to_transform=None, layers_pattern=None
    )


def with_site_names(config: C, patterns: Patterns, sites: Sequence[Subject]) -> C:
    """A config with names in the place of the patterns that choose among its sites: ranks, scales, feedforward.

    Raises:
        AdapterError: a pattern selects nothing; the nearest names are listed.
    """
    changes: dict[str, object] = {
        name: _by_name(name, getattr(config, name), own, sites) for name, own in patterns.keyed.items()
    }
    if patterns.feedforward is not None:
        names = [s.name for s in select(patterns.feedforward, sites, "feedforward_modules")]
        if not names:
            raise AdapterError(_nothing("feedforward_modules", patterns.feedforward, sites))
        # PEFT reads a list's entries as ends of names; a regular expression says exactly these
        changes["feedforward_modules"] = "|".join(re.escape(name) for name in names)
    return config.changed(**changes)


def spelled(names: Sequence[str], modules: Iterable[str]) -> list[str] | str:
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
