"""The swap: adapters are lowered once to slot values, and copied into the slots all or nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, ValuesView
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fxpeft.adapters.attach import check_together
from fxpeft.adapters.change import changing
from fxpeft.adapters.state import Adapter, Host, ModelState, Strength
from fxpeft.errors import AdapterError
from fxpeft.methods import slot_needs
from fxpeft.methods.values import Values
from fxpeft.passes.recent import Recent
from fxpeft.passes.slots import kronecker
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.rotation import BLOCK
from fxpeft.passes.slots.slot import LEAST, ActiveRank, Slot
from fxpeft.passes.slots.tokens import TokenSlot
from fxpeft.passes.targets.kinds import Kind
from fxpeft.serving import prompts as prompts_serving
from fxpeft.serving import tokens as tokens_serving
from fxpeft.serving.board import Board
from fxpeft.serving.brought import show_copies, show_features
from fxpeft.serving.guard import ModelLock
from fxpeft.serving.lowering import lower, side_by_side
from fxpeft.serving.packing import settle
from fxpeft.serving.ranks import clear_ranks
from fxpeft.serving.reach import SlotReach, check_invocations
from fxpeft.serving.staging import ACCELERATORS, StreamOrder
from fxpeft.serving.together import check_gains, check_ranks
from fxpeft.targets.sites import AdapterPlan


@dataclass
class Serving(Host):
    """The slots of a prepared model and what is in them.

    Args:
        rank: the active rank; ``None`` in static mode.
        kinds: site -> kind. saved: modules, and tensors: dotted parameter names, that an adapter may bring.
        prompts: the placeholder of a prompt, where prompts were declared.
        token_slots: module -> room for rows of its own, where trained tokens were declared.
        slots: site -> its placeholders. copies: module -> its replaceable copy.
        shown: the adapters that are in the slots now.
        dirty: site -> number of leading ranks that may hold something other than zero, where there are such.
        used: site -> number of ranks that its ``idle`` was set for; ``None``: unknown.
        featured: site and feature that may hold something other than its neutral value.
        holds: module or parameter -> values of the adapter whose copy it holds, ``None`` for the base's.
        plans: config -> plan, of the last ones, so that adapters of one config share the search for their sites.
        places: where the slots' memory is. Copies that were prepared for another list of places are made anew.
        held: the slots' tensors, as views of the dicts that hold them, which follow where a slot gets others.
        order: of reads and writes on accelerators, where slots are on such.
        torn: a swap began to write and did not come to its end.
        board: who is where, in slots with lanes. block: how many inputs blocks of rotations have.
        factor: by which inputs and outputs are taken apart for a Kronecker product; 0: there is no place for one.
        reach: which tokens of a call the adapters act on, where ``alora`` was declared.
    """

    max_rank: int
    rank: ActiveRank | None
    methods: tuple[str, ...]
    kinds: Mapping[str, Kind]
    saved: frozenset[str]
    tensors: frozenset[str]
    prompts: prompts_serving.PromptSlot | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)
    shown: list[Adapter] = field(default_factory=list)
    dirty: Mapping[str, int] = field(default_factory=dict)
    used: dict[str, int] | None = None
    featured: set[tuple[str, str]] = field(default_factory=set)
    holds: dict[str, tuple[Values | None, Any]] = field(default_factory=dict)
    plans: Recent[str, AdapterPlan] = field(default_factory=lambda: Recent(limit=64))
    places: list[int] = field(default_factory=list)
    held: list[ValuesView[Tensor | None]] = field(default_factory=list)
    order: StreamOrder | None = None
    torn: bool = False
    board: Board | None = None
    token_slots: dict[str, TokenSlot] = field(default_factory=dict)
    reach: SlotReach | None = None
    block: int = BLOCK
    factor: int = 0
    lock: ModelLock = field(default_factory=ModelLock)
    rescaling: ClassVar[Callable[..., None]]  # fxpeft.serving.call_scale has it

    def __post_init__(self) -> None:
        self.lock.rescale = functools.partial(type(self).rescaling, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "places": [], "held": [], "order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        older: dict[str, Any] = {"torn": False, "used": None, "board": None, "token_slots": {}}
        vars(self).update({**older, "places": [], "held": [], "order": None, **state})
        self.plans = Recent(state["plans"].items(), limit=64)  # a plain dict in older pickles
        self.__post_init__()

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """The optional placeholders that the declared methods need."""
        needs = slot_needs()
        found = frozenset[str]().union(*(needs[m] for m in self.methods))
        return found if self.factor else found - kronecker.KRONECKER

    def place(self, site: str) -> kronecker.Shapes | None:
        """The shapes of W1 and W2 where a site's slot has a place for a Kronecker product."""
        kind = self.kinds.get(site)
        has = kind is not None and kind.takes_kronecker and "w1" in self.features
        return kronecker.shapes(kind, self.factor) if kind is not None and has else None

    def hosts(self) -> set[str]:
        """Names of the modules that have placeholders."""
        sites = {kind.host(site) for site, kind in self.kinds.items()}
        return {*sites, *self.saved, *(path.rpartition(".")[0] for path in self.tensors), *self.token_slots}

    def locked(self) -> set[str]:
        """Names of the modules that a change of adapters writes to or binds anew."""
        return self.hosts() if self.prompts is None else {*self.hosts(), self.prompts.site}

    def install(self, model: nn.Module, state: ModelState, adapter: Adapter) -> None:
        with changing(model):
            if adapter.name in state.adapters:  # another thread was first
                raise AdapterError(f"there is an adapter named {adapter.name!r} already")
            settle(lower(model, self, adapter), self.slots)
            self.activate(model, state, [adapter] if state.enabled else [])
            state.adapters[adapter.name] = adapter
            state.active = [adapter.name]

    def activate(
        self, model: nn.Module, state: ModelState, adapters: list[Adapter], *, fresh: Adapter | None = None
    ) -> None:
        """Put lowered adapters into the slots, side by side along the rank; none: the bare model. Part of a change.

        Args:
            fresh: the one that is shown for the first time and may be the last: it is settled when it comes again.
        """
        for adapter in adapters:
            if not adapter.settled and adapter is not fresh:
                settle(adapter, self.slots)
        adapters = side_by_side(model, self, adapters)
        check_together(adapters)
        check_ranks(adapters, self.max_rank)
        check_gains(adapters)
        tokens_serving.check_alone(adapters)
        check_invocations(adapters)
        if self.board is not None:
            self.board.keep(adapters)
            self.board.check(adapters, self.max_rank)
        reshow(model, self, adapters)

    def replace(self, model: nn.Module, state: ModelState, adapter: Adapter, *, owned: bool) -> None:
        with changing(model):
            new = lower(model, self, adapter)
            if not owned or self.order is not None:
                settle(new, self.slots)
            active = [new if n == new.name else state.adapters[n] for n in state.active]
            check_together(active)
            if state.enabled and new.name in state.active:
                self.activate(model, state, active, fresh=new)
            self._renew(model, new)
            state.adapters[new.name] = new

    def rescale(self, model: nn.Module, state: ModelState, name: str, strength: Strength) -> None:
        with changing(model):
            changed = lower(model, self, replace(state.get(name), strength=strength))
            if changed.settled:
                settle(changed, self.slots)
            if state.enabled and name in state.active:
                self.activate(model, state, [changed if n == name else state.adapters[n] for n in state.active])
            self._renew(model, changed)
            state.adapters[name] = changed

    def _renew(self, model: nn.Module, adapter: Adapter) -> None:
        """Show another version of an adapter that is resident beside the active ones."""
        if self.board is not None and self.board.renew(adapter):
            if not adapter.settled:
                settle(adapter, self.slots)
            self.board.check(self.shown, self.max_rank)
            reshow(model, self, self.shown)

    def check_unnamed(self) -> None:
        """Refuse to take away what calls need whose rows have adapters of their own.

        Raises:
            AdapterError: a block is open.
        """
        if self.board is not None and self.board.pins:
            raise AdapterError("a block of fxpeft.rows or fxpeft.tokens is open, and needs slots and weights: leave it")

    def undo(self, model: nn.Module) -> Callable[[], None]:
        shown, board = self.shown, self.board
        beside = [] if board is None else board.beside

        def show_again() -> None:
            if board is not None:
                board.beside = beside
            if self.torn or self.shown is not shown:
                reshow(model, self, shown)

        return show_again


def serving_of(state: ModelState) -> Serving:
    """The model's slots, or an error that says how to get them."""
    if not isinstance(state.serving, Serving):
        raise AdapterError("the model has no slots: call prepare_hotswap(model) before compiling it")
    return state.serving


def reshow(model: nn.Module, serving: Serving, adapters: list[Adapter]) -> None:
    """Write the slots, whatever they hold now. Where that breaks off, they are torn until it is done again."""
    board = serving.board
    for adapter in adapters if board is None else (*adapters, *board.beside):
        if adapter.stale:
            settle(lower(model, serving, adapter), serving.slots)
            if board is not None:
                board.placed.pop(adapter.name, None)
    if serving.lock.factor != 1 and board is not None:
        type(serving).rescaling(serving, None, 1.0)  # what stays where it is is not written again
    if serving.torn:
        if board is not None:
            board.forget(serving.slots)
        serving.dirty = dict.fromkeys(serving.slots, serving.max_rank)
        serving.holds = {}
        serving.featured = {(site, name) for site, slot in serving.slots.items() for name in slot.features}
    adapters = side_by_side(model, serving, adapters)
    serving.torn = True
    serving.lock.version += 1
    _show(model, serving, adapters)
    serving.shown = list(adapters)
    serving.torn, serving.lock.factor = False, 1.0


def _show(model: nn.Module, serving: Serving, adapters: list[Adapter]) -> None:
    """Write the slots. Everything was checked; only copies are left."""
    _find_places(serving)
    if serving.board is not None:
        _show_lanes(model, serving, serving.board, adapters)
        return
    used: dict[str, int] = {}
    copies = []
    for adapter in adapters:
        each, ranks = _copies(serving, adapter, used)
        copies.append(each)
        used = {site: used.get(site, 0) + ranks.get(site, 0) for site in {**used, **ranks}} if used else ranks
    active = serving.max_rank if serving.rank is None else max([LEAST, *used.values()])
    same, serving.used = used is serving.used or used == serving.used, None
    with nullcontext() if serving.order is None else serving.order.writing() as ready:
        if ready is not None:
            for each in copies:
                each.stage()
            ready()
        if not (used is serving.dirty or used == serving.dirty):
            serving.dirty = clear_ranks(serving.slots, serving.dirty, used, active)
        for each in copies:
            each.run()
        if serving.features:
            show_features(serving.slots, serving.featured, adapters)
        show_copies(model, serving.copies, serving.tensors, serving.holds, adapters)
        prompts_serving.show(model, serving.prompts, adapters)
        tokens_serving.show(serving.token_slots, adapters)
    if not same or serving.features:
        for site, slot in serving.slots.items():
            idle = site not in used and not any((site, name) in serving.featured for name in slot.features)
            if slot.idle is not idle:  # setting an attribute of a module costs more than all the rest here
                slot.idle = idle
    if serving.rank is not None and len(serving.rank.carrier) != active:
        serving.rank.set(active)
    serving.used = used


def watch_reads(serving: Serving) -> None:
    """Let every forward have the rows that are named, or the tokens that are reached, where it is called."""
    if serving.board is not None:
        serving.board.order, serving.lock.before_read = serving.order, serving.board.before_read
    elif serving.reach is not None:
        serving.lock.before_read = serving.reach.before_read


def _show_lanes(model: nn.Module, serving: Serving, board: Board, adapters: list[Adapter]) -> None:
    """The same in slots with lanes, where every adapter has its ranks for itself."""
    with nullcontext() if serving.order is None else serving.order.writing() as ready:
        active = board.show(serving.slots, adapters, serving.places, ready)
        if serving.features:
            show_features(serving.slots, serving.featured, adapters)
        show_copies(model, serving.copies, serving.tensors, serving.holds, adapters)
        prompts_serving.show(model, serving.prompts, adapters)
        tokens_serving.show(serving.token_slots, adapters)
        show_copies(model, {path: m.copies[-1] for path, m in board.modules.items()}, (), board.holds, [])
    used = {site for place in board.placed.values() for site in place.adapter.lowered}
    for site, slot in serving.slots.items():
        if slot.idle is (site in used):
            slot.idle = site not in used
    if serving.rank is not None:
        serving.rank.set(active)


def _find_places(serving: Serving) -> None:
    """Look whether slots have other memory now, by ``.to(device)``, ``.data =`` and the like: views lead elsewhere."""
    if not serving.held:  # going by the slots' attributes costs more than the addresses
        serving.held = [slot._buffers.values() for slot in serving.slots.values()]
        if serving.prompts is not None:
            serving.held.append(serving.prompts._buffers.values())
        serving.held += [slot._buffers.values() for slot in serving.token_slots.values()]
    places = list(map(Tensor.data_ptr, itertools.chain.from_iterable(serving.held)))  # type: ignore[arg-type]
    if places != serving.places:
        serving.places = places
        for slot in serving.slots.values():
            slot.windows.clear()
        tensors = itertools.chain(*serving.held, *(c.buffers() for c in serving.copies.values()))
        devices = {t.device for t in tensors if t is not None and t.device.type in ACCELERATORS}
        if devices != set(serving.order.devices if serving.order else ()):
            serving.order = StreamOrder(devices) if devices else None
            serving.lock.before_read = serving.order.before_read if serving.order else None
            watch_reads(serving)


def _copies(serving: Serving, adapter: Adapter, used: Mapping[str, int]) -> tuple[Copies, dict[str, int]]:
    """The copies of an adapter to behind the ranks in use, and its ranks, where it has some.

    The first one's are kept, and have its gains and shifts.
    """
    first = not used
    if first and adapter.copies is not None and adapter.copies[0] is serving.places:
        return adapter.copies[1:]
    pairs: list[tuple[Tensor, Tensor]] = []
    written: list[Tensor] = []
    ranks: dict[str, int] = {}
    for site, value in adapter.lowered.items():
        slot = serving.slots[site]
        if rank := value.d.numel():
            ranks[site] = rank
            pairs += zip(slot.window(used.get(site, 0), rank), value[:3], strict=True)
            written += (slot.a, slot.b, slot.d)
        if first and slot.features:
            for name, own in value.features().items():
                if name in slot.features:
                    pairs.append((slot.beside(name), own))
                    written.append(getattr(slot, name))
    if ranks == serving.used:
        ranks = serving.used  # one dict for all adapters that are alike, and the same one is known sooner than an equal
    copies = Copies(pairs, written, join=adapter.settled)
    if first and adapter.settled:
        adapter.copies = (serving.places, copies, ranks)
    return copies, ranks
