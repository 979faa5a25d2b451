"""The plan: what an adapter would put where, to be read, kept, compared and applied before anything changes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.api import add_adapter
from fxpeft.adapters.values import shared_placement
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import SitePlan
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.model.fast_path import fused_above
from fxpeft.model.modules import Modules
from fxpeft.model.placement import placement
from fxpeft.model.reads import read_past
from fxpeft.model.trace import first_readers, model_flow
from fxpeft.model.trace import roles as roles_of
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import Skip
from fxpeft.passes.draw import Picture
from fxpeft.passes.live import base_class
from fxpeft.passes.live.split import is_whole_compiled, why_whole
from fxpeft.passes.targets.flow import Flow
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import NameSelector, pattern_value
from fxpeft.passes.targets.patterns import explain, from_peft
from fxpeft.passes.targets.terms import Pattern, Subject
from fxpeft.planning.data import PlanData, PlanRow, SharedRow
from fxpeft.planning.picture import draw_plan
from fxpeft.planning.table import PlanDiff, collapse, diff_plans, plan_text
from fxpeft.targets.experts import converted
from fxpeft.targets.resolve import Roles, has_pattern, subjects_of
from fxpeft.targets.sites import AdapterPlan, make_plan

PlanSite = PlanRow  # its name in plans that 0.1.0 pickled


class Plan(PlanData):
    """Every site of an adapter, made by :func:`plan` before anything is changed; prints as a table.

    Its fields are those of :class:`~fxpeft.planning.data.PlanData`.
    """

    def __str__(self) -> str:
        return plan_text(self)

    def diff(self, other: PlanData) -> PlanDiff:
        """What changes from this plan to ``other``; false where nothing does, prints as lines."""
        return diff_plans(self, other)

    def draw(self, layer: int = 0, path: str | Path | None = None) -> Picture:
        """One layer's data flow, before and after the rewrite, its sites coloured by role.

        Args:
            layer: the layer's index.
            path: an ``.svg``, ``.png`` or ``.pdf`` file to write.

        Raises:
            AdapterError: the plan has no data flow (it was read from JSON, or the model can't be traced),
                or there is no such layer.
        """
        picture = draw_plan(self, layer)
        if path is not None:
            picture.save(path)
        return picture


@matching()
def plan(
    model: nn.Module, config: AdapterConfig, *, inputs: Mapping[str, Any] | None = None, roles: bool = True
) -> Plan:
    """What ``add_adapter(model, config)`` would do. Nothing is changed, no weight is read.

    The model is traced for the roles of its modules where these are first asked for: by a pattern, ``print``,
    ``site.role``, what was skipped, the notes, JSON. Until then, and until it is drawn, the plan holds the model.

    Args:
        model: may be on the meta device, made before any weight is loaded.
        inputs: keyword arguments of ``forward``, for a model that fxpeft knows no inputs of.
        roles: let the plan have roles. Where the model can't be traced it has a note.

    Raises:
        AdapterError: as :func:`fxpeft.add_adapter`.
    """
    model = unwrap(model)
    modules = Modules(model)
    given = copy.deepcopy(config)  # reasons are told in its words, whatever becomes of it until then
    early = _roles(model, inputs) if roles and inputs is not None else None
    known = None if early is None or early[1] else early[0]
    found = make_plan(modules, converted(modules, config), roles=known)
    method = method_of(found.config)
    sites = []
    for name, site in found.sites.items():
        host = site.kind.host(name)
        dtype, base = (placement(modules[host], model, autocast, site.kind.leaf)[1] for autocast in (True, False))
        shapes = method.shapes(found.config, site)
        count, size = method.cost(found.config, site, dtype)
        # what feeds a forward adds no work per token; a parameter is updated once a call, whatever the tokens
        told = method.flops(found.config, site)
        flops = 0 if method.feeds or site.kind.leaf else _flops(site, shapes.values()) if told is None else told
        alpha = None
        if hasattr(found.config, "lora_alpha"):
            own = getattr(found.config, "alpha_pattern", None) or {}
            alpha = pattern_value(own, name, found.config.lora_alpha, "alpha_pattern")
        kept, leaf = method.kept(found.config, site), site.kind.leaf
        own = kept.own * (base if leaf else dtype).itemsize + kept.outputs * base.itemsize
        read = torch.int64.itemsize if site.kind.looks_up else site.kind.in_features * base.itemsize
        sites.append(
            PlanRow(
                name, "", site.kind.name, site.kind.in_features, site.kind.out_features,
                site.rank, alpha, site.scaling, count, size, flops,
                own, read if kept.input else 0, _update(modules[host], site.kind, base) if leaf else "",
            )
        )  # fmt: skip
    made = Plan(
        base_class(model).__name__, dataclasses.replace(found.config), tuple(sites), (), tuple(found.saved),
        tuple(found.tensors), (), None, _shared(model, found), _brought(modules, found),
    )  # fmt: skip

    def later(name: str) -> None:
        if name == "flow":
            vars(made)["flow"] = _flow(model, inputs)
        else:
            known, untold = early or _roles(model, inputs) if roles else ({}, [])
            skipped, notes = _told(given, found, modules, known)
            readers = first_readers(model, inputs) if known else {}
            counted: dict[str, str] = {}
            for site in sites:
                host = found.sites[site.name].kind.host(site.name)
                read = site.name if site.update else readers.get(host, host)  # an expert's rows are its own
                first = counted.setdefault(read, site.name) if site.kept_input else site.name
                vars(site)["input_of"] = "" if first == site.name else first
                vars(site)["role"] = ", ".join(known.get(host, ()))
                vars(site).pop("_later", None)
            updates = dict.fromkeys(site.update for site in sites if site.update)
            told = [f"{', '.join(collapse([s.name for s in sites if s.update == why]))}: {why}" for why in updates]
            vars(made).update(skipped=skipped, notes=(*untold, *notes, *told))
        if vars(made).keys() >= {"skipped", "flow"}:
            vars(made).pop("_later", None)

    if not roles:
        later("skipped")
        return made
    for each, names in ((made, ("skipped", "notes", "flow")), *((site, ("role", "input_of")) for site in sites)):
        for name in names:
            del vars(each)[name]
        vars(each)["_later"] = later
    return made


def _update(host: nn.Module, kind: Kind, dtype: torch.dtype) -> str:
    """How the update of a parameter meets the input, and why."""
    why = why_whole(host) if getattr(kind, "experts", None) else "it is one matrix"
    if why:
        return f"whole weight, the update is added to all of it once a call: {why}"
    split = "split, the update is applied to the rows that go to each expert: its forward multiplies with one at a time"
    if is_whole_compiled(host, dtype):
        return f"{split}; compiled it is the whole weight, since torch's grouped product takes nothing else there"
    return split


def _flow(model: nn.Module, inputs: Mapping[str, Any] | None) -> Flow | None:
    """A model's data flow, where it can be traced."""
    try:
        return model_flow(model, inputs)
    except AdapterError:
        return None


def _roles(model: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[Roles, list[str]]:
    """What a model's modules do; where it can't be traced nothing, and a note that says why."""
    try:
        return roles_of(model, inputs), []
    except AdapterError as error:
        return {}, [f"no roles: {str(error).splitlines()[0]}"]


@matching()
def _told(
    config: AdapterConfig, found: AdapterPlan, modules: Modules, known: Roles
) -> tuple[tuple[Skip, ...], list[str]]:
    """What is left out and why, and what else there is to say."""
    method = method_of(found.config)
    subjects = subjects_of(modules, known) if method.targeted else []
    selector = found.config.selector() if subjects else None
    targets, exclude = (
        from_peft(value) if value is not None and has_pattern(value) else None
        for value in (config.target_modules, config.exclude_modules)
    )
    hosts = {site.kind.host(name) for name, site in found.sites.items()}
    unread = {n: why for n in modules if n and (why := modules.idle(n))} if method.targeted else {}
    reasons = {
        subject.name: _why_not(targets, exclude, selector, subject, modules[subject.name])
        for subject in subjects
        if subject.name not in hosts
    } | unread
    skipped = tuple(Skip(name, reasons[name]) for name in modules if name in reasons)
    notes = [
        f"{name}: {f'the rows of {own.tied}, whose weight it is' if own.tied else f'{len(own.tokens)} rows of its own'}"
        for name, own in found.tokens.items()
    ]
    notes += [f"{name}: the update, or the copy, of {first}, whose weight it has" for name, first in found.tied.items()]
    if tokens := method.invocation(config):
        notes.append(f"acts from the last occurrence of the tokens {list(tokens)} on")
    notes += method.notes(found.config, found.sites)
    notes += _beside([name for name in modules if name in hosts], modules)
    return skipped, notes + (_unused(config, subjects) if subjects else [])


def _shared(model: nn.Module, found: AdapterPlan) -> tuple[SharedRow, ...]:
    shapes = method_of(found.config).shared(found.config, found.sites)
    size = shared_placement(model, found.sites, autocast=True)[1].itemsize if shapes else 0
    return tuple(SharedRow(name, math.prod(shape), math.prod(shape) * size) for name, shape in shapes.items())


def _brought(modules: Mapping[str, nn.Module], found: AdapterPlan) -> tuple[SharedRow, ...]:
    """What an adapter trains beside its sites, each once."""
    rows: list[SharedRow] = []
    for path in (path for path in found.saved if path not in found.tied):
        own = list(modules[path].parameters())
        rows.append(SharedRow(path, sum(p.numel() for p in own), sum(p.numel() * p.itemsize for p in own)))
    for path in found.tensors:
        host, _, leaf = path.rpartition(".")
        value: Tensor = getattr(modules[host], leaf)
        rows.append(SharedRow(path, value.numel(), value.numel() * value.itemsize))
    for path, tokens in found.tokens.items():
        if not tokens.tied:
            value = modules[path].weight  # type: ignore[assignment]
            count = len(tokens.tokens) * value.shape[1]
            rows.append(SharedRow(path, count, count * value.itemsize))
    return tuple(rows)


def apply(plan: Plan, model: nn.Module, name: str = "default") -> None:
    """Do what a plan says: add a fresh adapter to ``model``.

    Raises:
        AdapterError: the model's sites are not the plan's, or as :func:`fxpeft.add_adapter`; nothing was
            changed.
    """
    own = make_plan(unwrap(model), plan.config, heads=False)
    planned = {s.name: (s.kind, s.in_features, s.out_features, s.rank, s.scaling) for s in plan.sites}
    real = {n: (s.kind.name, s.kind.in_features, s.kind.out_features, s.rank, s.scaling) for n, s in own.sites.items()}
    differ = [
        f"{site}: the plan has {planned.get(site, 'no such site')}, the model {real.get(site, 'no such site')}"
        for site in dict.fromkeys((*planned, *real))
        if planned.get(site) != real.get(site)
    ]
    if differ:
        raise AdapterError(
            f"the plan was made for another model than this {type(model).__name__}; nothing was changed.\n"
            f"(kind, in, out, rank, scaling)\n{listing(differ)}\nMake a new one with fxpeft.plan(model, config)."
        )
    add_adapter(model, plan.config, name)


def _flops(site: SitePlan, shapes: Iterable[tuple[int, ...]]) -> int:
    """A matrix costs two per element, a vector one; an embedding's A is looked up and costs nothing."""
    shapes = list(shapes)
    looked_up = site.kind.a_shape(site.rank) if site.kind.looks_up else None
    if looked_up in shapes:
        shapes.remove(looked_up)
    return sum(math.prod(shape) * (2 if sum(d > 1 for d in shape) > 1 else 1) for shape in shapes)


def _why_not(
    targets: Pattern | None, exclude: Pattern | None, selector: NameSelector | None, subject: Subject, module: nn.Module
) -> str:
    """Why a module is no site, in the words of the config that was given.

    Args:
        targets, exclude: of that config, where they are patterns. selector: of the one with all filled in.
    """
    if subject.kind is None:
        return f"{base_class(module).__name__} is no kind of target"
    if exclude is not None and exclude(subject):
        return "matches exclude_modules"
    why = targets.why_not(subject) if targets is not None else None
    return why or (selector.why_not(subject.name) if selector is not None else None) or "matches no target"


def _beside(hosts: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Sites that are called, and whose weight is read past the call in some branch of the forward."""
    readers: dict[str, list[str]] = {}
    for name in hosts:
        past = read_past(name, modules) if name else None
        if past is not None and not fused_above(modules[""], [name]):
            readers.setdefault(past.reader, []).append(name)
    return [
        f"{reader} also reads the weight of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} without calling "
        "it, in a branch where an adapter has no effect (a fused kernel, for instance)"
        for reader, names in readers.items()
    ]


def _unused(config: AdapterConfig, subjects: Sequence[Subject]) -> list[str]:
    """Terms and names that select nothing: typos, most likely."""
    notes = []
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if value is not None and (has_pattern(value) or not isinstance(value, str)):
            notes += [f"{name}: {line}" for line in explain(from_peft(value), subjects)]
    return notes
