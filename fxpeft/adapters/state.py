"""What fxpeft keeps for one model: its adapters, which are active, and what serves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from fxpeft.adapters.calls import STATE, unwatch_calls, watch_calls
from fxpeft.adapters.invocation import Call, cache_in, mark, mask_of
from fxpeft.adapters.lock import SwapLock
from fxpeft.adapters.name import check_adapter_name
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.base import SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.model.walk import base_state
from fxpeft.model.wrappers import faces, unwrap
from fxpeft.passes.base import attribute, join
from fxpeft.passes.recent import Recent
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.reach import Reach, nowhere
from fxpeft.passes.slots.room import Room, Span
from fxpeft.targets.sites import AdapterPlan

if TYPE_CHECKING:
    from fxpeft.adapters.inplace import Folded


#: a factor on an adapter's own scale, or site -> factor, 1 where none is named
Strength: TypeAlias = float | Mapping[str, float]


@dataclass
class Adapter:
    """One named set of a method's parameters.

    Args:
        values: the tensors. While the adapter is attached its modules hold the truth; see :meth:`current`.
        strength: factor on the adapter's own scale; see :func:`fxpeft.set_scale`.
        parts: while attached: host module's name -> what is registered there as ``adapters.<name>``; site of a
            parameter -> what is below that.
        lowered: on a prepared model: site -> slot values. prompt: there, the finished prompt of a prompt method.
        settled: whether the slot values are contiguous, in memory of the adapter's own: showing them is a plain copy.
        room: that memory; the site's values are views of it where they can be.
        copies: how to show the adapter alone in the slots: the list of places where those were, the copies, and the
            rank of each site that has one, or in slots with lanes its place.
        trained: what :func:`fxpeft.set_requires_grad` said since the active adapters were last chosen.
        stale: the slot values follow from weights that the base no longer has: lowered anew before they are shown.
        reach: while attached, of one that has an invocation: which tokens of a call it acts on.
    """

    name: str
    plan: AdapterPlan
    values: Values
    strength: Strength = 1.0
    parts: dict[str, nn.Module] = field(default_factory=dict)
    lowered: dict[str, SlotValues] = field(default_factory=dict)
    prompt: Tensor | None = None
    settled: bool = False
    room: Room | None = field(default=None, compare=False)
    copies: tuple[list[int], Copies, dict[str, int]] | None = field(default=None, compare=False)
    trained: bool | None = None
    stale: bool = False
    reach: Reach | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_adapter_name(self.name)  # whatever entry it came in by

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "copies": None}  # they lead into this model's slots, not into a copy's
        if self.room is not None:  # each tensor would bring all of it
            state |= _parts(self.values, self.lowered, lambda t: self.room.span(t) or t)  # type: ignore[union-attr]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = _parts(state["values"], state["lowered"], lambda t: t.tensor() if isinstance(t, Span) else t)
        vars(self).update({"room": None, **state, **own})

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config, defaults filled in."""
        return self.plan.config

    def strength_at(self, site: str) -> float:
        """The factor on the adapter's own scale at a site."""
        return self.strength if isinstance(self.strength, float | int) else self.strength.get(site, 1.0)

    def stronger(self, factor: float) -> Strength:
        """The factors on its own scale, times another one."""
        if isinstance(self.strength, float | int):
            return self.strength * factor
        return {site: self.strength_at(site) * factor for site in self.values.sites}

    def site_plan(self, site: str) -> SitePlan:
        """What is planned at a site, at the strength that it has there."""
        return self.plan.sites[site].scaled(self.strength_at(site))

    def hosts(self) -> set[str]:
        """Names of the modules that the adapter touches."""
        sites = {self.plan.sites[site].kind.host(site) for site in self.values.sites}
        return {*sites, *self.values.saved, *map(_owner, self.values.tensors), *self.plan.tokens}

    def parameter_sites(self) -> dict[str, dict[str, str]]:
        """Module -> name -> site of its parameters that the adapter updates."""
        found: dict[str, dict[str, str]] = {}
        for site in self.values.sites:
            kind = self.plan.sites[site].kind
            if kind.leaf:
                found.setdefault(kind.host(site), {})[kind.leaf] = site
        return found

    def current(self) -> Values:
        """The tensors as they are now, trained or cast since."""
        if not self.parts:
            return self.values
        held = {site: self.parts[site] for site in self.values.sites}
        return Values(
            {s: {n: attribute(held[s], n).detach() for n in names} for s, names in self.values.sites.items()},
            {path: {k: v.detach() for k, v in base_state(self.parts[path]).items()} for path in self.values.saved},
            {p: attribute(self.parts[_owner(p)], p.rpartition(".")[2]).detach() for p in self.values.tensors},
            {name: attribute(next(iter(held.values())), f"shared.{name}").detach() for name in self.values.shared},
            {name: attribute(self.parts[name], "rows").detach() for name in self.values.tokens},
        )

    @property
    def trains(self) -> bool:
        """Whether an optimiser would change it."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of an attached adapter."""
        for part in self.parts.values():
            yield from part.parameters()


class Host(ABC):
    """What serves the adapters of a prepared model in the place of modules of their own; ``fxpeft.serving`` has it.

    Attributes:
        lock: holds forwards off while the adapters change. saved: modules that an adapter may bring.
        plans: config -> plan, of the last ones, so that adapters of one config share the search for their sites.
        reach: finds which tokens of a call its adapters act on, where such with an invocation were declared.
    """

    lock: SwapLock
    saved: frozenset[str]
    plans: Recent[str, AdapterPlan]
    reach: Any

    @abstractmethod
    def install(self, model: nn.Module, state: ModelState, adapter: Adapter) -> None:
        """Take a new adapter in and make it the active one."""

    @abstractmethod
    def activate(self, model: nn.Module, state: ModelState, adapters: list[Adapter]) -> None:
        """Serve these adapters, whose updates add up; none: the bare model."""

    @abstractmethod
    def replace(self, model: nn.Module, state: ModelState, adapter: Adapter, *, owned: bool) -> None:
        """Put an adapter in the place of the one of its name, active where that is.

        Args:
            owned: nobody else can write to its values' memory.
        """

    @abstractmethod
    def rescale(self, model: nn.Module, state: ModelState, name: str, strength: Strength) -> None:
        """Change an adapter's strength."""

    @abstractmethod
    def undo(self, model: nn.Module) -> Callable[[], None]:
        """What serves the adapters again that are served now."""


class TrainedBefore:
    """Which parameters are trained of the adapters that change from here on, however many others there are.

    Args:
        adapters: those of the model. One whose parameters are others later is no longer meant.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.parts = {name: adapter.parts for name, adapter in adapters.items()}
        self.noted: dict[str, tuple[Adapter, bool | None, list[tuple[nn.Parameter, bool]]]] = {}

    def note(self, adapter: Adapter) -> None:
        """Remember an adapter as it is, where it is the first time and the adapter was there."""
        if adapter.name not in self.noted and self.parts.get(adapter.name) is adapter.parts:
            grads = [(parameter, parameter.requires_grad) for parameter in adapter.parameters()]
            self.noted[adapter.name] = adapter, adapter.trained, grads


@dataclass
class ModelState:
    """The adapters of one model. It names the base's modules and holds none: a copy of the model copies it.

    Args:
        serving: what serves the adapters of a prepared model; ``None``: they are modules below those they adapt.
        folded: what is in the base's weights and can be taken out. baked: names of what is there for good.
        dropped: everything was taken out of the model: it is bare.
        notes: of the ``with`` blocks that are open: which parameters are trained of the adapters that change inside.
        apart: inside of a ``with rows(...)`` block of a model without slots: nothing can change. in_rows: names of the
            modules that were found to see the rows of a batch.
        reaching: an adapter was attached that acts on some tokens of a call. What a compiler guards in any call is this
            alone, and no names.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    base_grads: dict[str, bool] = field(default_factory=dict)
    serving: Host | None = None
    folded: Folded | None = None
    baked: list[str] = field(default_factory=list)
    dropped: bool = False
    notes: list[TrainedBefore] = field(default_factory=list)
    apart: bool = False
    in_rows: set[str] = field(default_factory=set)
    reaching: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "notes": []}  # a copy is in no block

    def __setstate__(self, state: dict[str, Any]) -> None:
        # older pickles have none of these
        vars(self).update({"notes": [], "apart": False, "in_rows": set(), "reaching": False, **state})

    def get(self, name: str) -> Adapter:
        """The adapter of that name, or an error that lists the names there are."""
        if name not in self.adapters:
            raise AdapterError(f"no adapter named {name!r}; loaded: {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def running(self) -> list[Adapter]:
        """The adapters that take part in the forward now."""
        return [self.adapters[name] for name in self.active] if self.enabled else []

    def reaches(self) -> bool:
        """Whether the tokens of calls matter to an adapter."""
        if self.serving is not None:
            return self.serving.reach is not None
        return self.reaching and any(True for _ in self._invoked())

    def enter(self, call: Call) -> None:
        """A call of the model begins: find which of its tokens the adapters act on."""
        if self.serving is not None:
            self.serving.reach.enter(call)
            return
        for reach, tokens in self._invoked():
            (reach.mask, seen), reach.kept = mask_of(call, tokens), call.kept
            reach.seen = seen if call.cache is None else None

    def leave(self, output: Any) -> None:
        """The call has ended. What was found stays for its backward, if it may have one."""
        if self.serving is not None:
            self.serving.reach.leave(output)
            return
        for reach, tokens in self._invoked():
            mark(cache_in(output), tokens, reach.seen)
            reach.seen = None
            if not torch.is_grad_enabled():
                reach.mask = nowhere()

    def _invoked(self) -> Iterator[tuple[Reach, tuple[int, ...]]]:
        for adapter in self.adapters.values() if self.apart else self.running():
            if adapter.reach is not None:
                yield adapter.reach, method_of(adapter.config).invocation(adapter.config)

    def chosen(self, name: str | None) -> Adapter:
        """The adapter of that name; ``None``: the one that is active."""
        return self.get(only_active(self) if name is None else name)

    def note(self, adapter: Adapter) -> None:
        """Say that which of an adapter's parameters are trained is about to change."""
        for before in self.notes:
            before.note(adapter)

    def in_weights(self) -> list[str]:
        """Names of the adapters that are in the base's weights, those that stay there first."""
        return [*self.baked, *(self.folded.names if self.folded else ())]

    def check_unfolded(self, names: Iterable[str], what: str) -> None:
        """Refuse to do something to adapters that are in the base's weights."""
        inside = self.in_weights()
        for name in names:
            if name in inside:
                todo = "it stays there (keep=None)" if name in self.baked else "unfold the model first"
                raise AdapterError(f"adapter {name!r} is folded into the base's weights, so {what}; {todo}")


def find_state(model: nn.Module) -> ModelState | None:
    """The model's state, or ``None`` for a bare model."""
    state: ModelState | None = vars(unwrap(model)).get(STATE)
    return None if state is None or state.dropped else state


def is_prepared(model: nn.Module) -> bool:
    """Whether the model's adapters are served from slots."""
    state = find_state(model)
    return state is not None and state.serving is not None


def declared_modules(model: nn.Module) -> frozenset[str]:
    """Modules that an adapter may bring whole by what the model was prepared for."""
    state = find_state(model)
    return frozenset() if state is None or state.serving is None else state.serving.saved


def state_of(model: nn.Module) -> ModelState:
    """The model's state.

    Raises:
        AdapterError: the model has no adapters and is not prepared for any.
    """
    state = find_state(model)
    if state is None:
        raise AdapterError(f"{type(model).__name__} has no adapters: call add_adapter, load_adapter or prepare_hotswap")
    return state


def only_active(state: ModelState) -> str:
    """The active adapter's name; ``AdapterError`` where there are several or none."""
    if len(state.active) != 1:
        raise AdapterError(f"{len(state.active)} adapters are active; say which one: {', '.join(state.adapters)}")
    return state.active[0]


def ensure_state(model: nn.Module, modules: Modules | None = None) -> ModelState:
    """The model's state, made where missing; then the base's parameters are frozen."""
    found = find_state(model)
    if found is None:
        found = state = ModelState()
        for name, parameter in _base_parameters(modules or Modules(model)):
            state.base_grads[name] = parameter.requires_grad
            parameter.requires_grad_(False)
        for face in faces(model):
            vars(face)[STATE] = state
        watch_calls(model)
    return found


def drop_state(model: nn.Module) -> None:
    """Forget the state and give the base's parameters their ``requires_grad`` back."""
    state: ModelState = vars(model)[STATE]
    # whoever shares the model's attributes, made by copy.copy or by regional compilation, has the state too
    state.dropped = True
    for face in faces(model):
        vars(face).pop(STATE, None)
    unwatch_calls(model)
    for name, parameter in _base_parameters(Modules(model)):
        parameter.requires_grad_(state.base_grads.get(name, parameter.requires_grad))


def _base_parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()  # a tied one counts once, under its first name
    for module_name, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield join(module_name, name), parameter


def _parts(values: Values, lowered: dict[str, SlotValues], function: Callable[[Any], Any]) -> dict[str, Any]:
    """An adapter's values and slot values with a function applied to each."""
    own = {s: SlotValues._make(None if t is None else function(t) for t in v) for s, v in lowered.items()}
    return {"values": values.each(function), "lowered": own}


def _owner(path: str) -> str:
    return path.rpartition(".")[0]
