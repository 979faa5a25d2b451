"""The board: which adapters are resident in slots with lanes, where, and what the rows of a call are named for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxpeft.adapters.invocation import Tokens
from fxpeft.adapters.lock import SwapLock
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.passes.base import attribute
from fxpeft.passes.live.lane_modules import LaneModules
from fxpeft.passes.slots.lanes import Lanes, RowTensors
from fxpeft.passes.slots.slot import LANE, LEAST, NEUTRAL, Slot
from fxpeft.passes.slots.tokens import TokenSlot
from fxpeft.passes.torch_private import skip_frame
from fxpeft.serving import tokens as tokens_serving
from fxpeft.serving.brought import Holds
from fxpeft.serving.places import Place, clear_windows, lane_copies
from fxpeft.serving.prompts import PromptSlot
from fxpeft.serving.reach import RowStarts, SlotReach
from fxpeft.serving.staging import StreamOrder

TOKENS, MODULE, PROMPT = "tokens", "module", "prompt"  # what a lane may hold beside features


@dataclass(frozen=True, eq=False)
class Named:
    """What the rows of a call are named for.

    Args:
        mixtures: each adapter's name -> its weight; empty: the bare base.
        ids: which of them a row has, ``[rows]``, or a token, ``[rows, tokens]``.
        repeats: how many rows of a call each may stand for, side by side, as beams do.
        virtual: for each token its place in the soft prompt of what it names, or -1, ``[rows, tokens]``.
    """

    mixtures: Sequence[Mapping[str, float]]
    ids: Tensor
    repeats: int = 1
    virtual: Tensor | None = None

    def names(self) -> list[str]:
        """The adapters that are named, each once."""
        return list(dict.fromkeys(name for mixture in self.mixtures for name in mixture))


#: a task of an event loop has its own, and a thread that ``asyncio.to_thread`` uses has its caller's
_named: ContextVar[Mapping[Lanes, Named]] = ContextVar("fxpeft_rows")


@dataclass
class Board:
    """The residents of a prepared model's slots: the active adapters, and ``beside`` them those that rows name.

    Args:
        placed: name -> place of each that is in the slots now.
        pins: of each open ``with`` block the names that it has. used: resident -> when it was last named, by ``clock``.
        version: counts what changes places.
        held: slot and lane with a feature, rows of an embedding or a module of its own, other than neutral.
        modules: those of which each lane has a copy. token_slots: with rows for each lane. prompts: with one for each.
        for_all: module that an adapter may bring -> why rows can't have it each of their own.
        holds: of which values of the base the lanes' copies for no adapter are.
        reach: finds the tokens of a call that its rows' adapters act on, where such with an invocation were declared.
    """

    lanes: Lanes
    beside: list[Adapter] = field(default_factory=list)
    placed: dict[str, Place] = field(default_factory=dict)
    pins: dict[object, Collection[str]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    clock: int = 0
    version: int = 0
    held: set[tuple[str, str, int]] = field(default_factory=set)
    modules: dict[str, LaneModules] = field(default_factory=dict)
    token_slots: Mapping[str, TokenSlot] = field(default_factory=dict)
    prompts: PromptSlot | None = None
    for_all: Mapping[str, str] = field(default_factory=dict)
    holds: Holds = field(default_factory=dict)
    device: torch.device | None = None
    order: StreamOrder | None = None
    reach: SlotReach | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pins": {}, "used": {}, "order": None}  # nobody has named rows of a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {"modules": {}, "token_slots": {}, "prompts": None, "for_all": {}, "holds": {}, "reach": None, **state}
        )  # older ones

    # --- who is resident ---

    def keep(self, active: Sequence[Adapter]) -> None:
        """Have beside other active adapters those that open blocks name."""
        there = {adapter.name for adapter in active}
        residents = (place.adapter for place in self.placed.values())
        known, pinned = {a.name: a for a in (*residents, *self.beside)}, self.pinned()
        self.beside = [a for name, a in known.items() if name in pinned and name not in there]

    def pinned(self) -> set[str]:
        """The adapters that open blocks name."""
        return {name for names in tuple(self.pins.values()) for name in names}

    def touch(self, names: Iterable[str]) -> None:
        """Note that these are named now."""
        self.clock += 1
        self.used.update(dict.fromkeys(names, self.clock))

    def renew(self, adapter: Adapter) -> bool:
        """Have another version of a resident; returns whether an older one is in the slots."""
        self.beside = [adapter if a.name == adapter.name else a for a in self.beside]
        place = self.placed.get(adapter.name)
        return place is not None and place.adapter is not adapter

    def drop(self, names: Collection[str]) -> None:
        """Let go of residents that are no more, where no open block names them. Part of a change."""
        gone = set(names) - self.pinned()
        self.beside = [a for a in self.beside if a.name not in gone]
        self.placed = {name: place for name, place in self.placed.items() if name not in gone}

    def take(self, active: Sequence[Adapter], wanted: Iterable[Adapter], max_rank: int) -> None:
        """Have these resident, in the places of those that were named longest ago and that nobody names now.

        Raises:
            AdapterError: there is no room.
        """
        there = {adapter.name for adapter in active}
        beside, pinned = [a for a in self.beside if a.name not in there], self.pinned()
        for adapter in (a for a in wanted if a.name not in there):
            others = [a for a in beside if a.name != adapter.name]
            at = next((i for i, a in enumerate(beside) if a.name == adapter.name), len(others))
            while (problem := self.problem(active, [*others, adapter], max_rank)) is not None:
                free = [i for i, a in enumerate(others) if a.name not in pinned]
                if not free:
                    raise AdapterError(problem)
                at = min(free, key=lambda i: self.used.get(others[i].name, 0))
                del others[at]
            beside = [*others[:at], adapter, *others[at:]]
        self.beside = beside

    def check(self, active: Sequence[Adapter], max_rank: int) -> None:
        """Refuse active adapters that don't go in together with those beside them.

        Raises:
            AdapterError: there is no room, or they bring what every row would get.
        """
        if (problem := self.problem(active, self.beside, max_rank)) is not None:
            raise AdapterError(problem)
        for adapter in active if self.pins else ():
            self.check_rows_take(adapter)

    def problem(self, active: Sequence[Adapter], beside: Sequence[Adapter], max_rank: int) -> str | None:
        """Why these don't go into the slots together, or ``None``."""
        names = ", ".join(a.name for a in (*active, *beside))
        count, end = len(active) + len(beside), self._end(active, beside)
        if count > self.lanes.count:
            return f"{count} adapters at once ({names}), more than the {self.lanes.count} lanes: {_MORE}"
        if end > max_rank:
            return f"{end} ranks side by side of {names}, more than max_rank {max_rank}: {_MORE}"
        return None

    def check_rows_take(self, adapter: Adapter) -> None:
        """Refuse an adapter that brings what only all rows of a call can have.

        Raises:
            AdapterError: it does.
        """
        brings = [f"{path} ({self.for_all[path]})" for path in adapter.values.saved if path not in self.modules]
        brings += adapter.values.tensors
        if brings:
            raise AdapterError(
                f"adapter {adapter.name!r} brings {', '.join(brings)}, which rows of one call can't have each of their "
                "own: set it active, and call the model without naming rows"
            )

    # --- how they get there ---

    def show(
        self,
        slots: Mapping[str, Slot],
        active: Sequence[Adapter],
        memory: list[int],
        ready: Callable[[], None] | None,
    ) -> int:
        """Write what isn't there yet; returns how many ranks a call without rows computes with.

        Args:
            memory: where the slots are; copies that were prepared for another list are prepared anew.
            ready: called between what may go on beside forwards and what may not; ``None``: nothing goes to a device.
        """
        places, end = self._layout(active), self._end(active, ())
        new = [place for name, place in places.items() if not place.same(self.placed.get(name))]
        self.placed = {}  # until all is written
        copies = [lane_copies(slots, place, memory) for place in new]
        if ready is not None:
            for each in copies:
                each.stage()
            ready()
        clear_windows(slots, [*((p.start, p.width) for p in new), *([(end, LEAST - end)] if end < LEAST else [])])
        for each in copies:
            each.run()
        for place in new:
            self._show_features(slots, place)
            self._show_own(place)
        self.placed, self.version = places, self.version + 1
        self.used = {name: self.used.get(name, 0) for name in places}
        self.device = next((slot.a.device for slot in slots.values()), None)
        return max(LEAST, end)

    def _layout(self, active: Sequence[Adapter]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for adapter in (*active, *self.beside):
            start = max((place.start + place.width for place in places.values()), default=0)
            if len(places) >= len(active):
                start = max(start, LEAST)  # the ranks before are of a call without rows
            known = self._known(adapter)
            gains = known.gains if known else has_gains(adapter)
            alone = not places and bool(active)
            places[adapter.name] = Place(adapter, len(places), start, self._width(adapter), alone, gains)
        return places

    def _known(self, adapter: Adapter) -> Place | None:
        place = self.placed.get(adapter.name)
        return place if place is not None and place.adapter is adapter else None

    def _width(self, adapter: Adapter) -> int:
        """The most ranks that an adapter has at a site."""
        known = self._known(adapter)
        return known.width if known else max((value.d.numel() for value in adapter.lowered.values()), default=0)

    def _end(self, active: Sequence[Adapter], beside: Sequence[Adapter]) -> int:
        end = sum(map(self._width, active))
        return max(end, LEAST) + sum(map(self._width, beside)) if beside else end

    @torch.no_grad()
    def _show_features(self, slots: Mapping[str, Slot], place: Place) -> None:
        for site, slot in slots.items():
            value = place.adapter.lowered.get(site)
            for name in slot.features:
                own = None if value is None else getattr(value, name)
                if self._holds(site, name, place.lane, own is not None):
                    lane = getattr(slot, LANE + name)[place.lane]
                    lane.fill_(NEUTRAL[name]) if own is None else lane.copy_(own)

    @torch.no_grad()
    def _show_own(self, place: Place) -> None:
        """Rows of embeddings, whole modules and a prompt in their lane, or nothing."""
        lane, adapter = place.lane, place.adapter
        for name, slot in self.token_slots.items():
            if self._holds(name, TOKENS, lane, name in adapter.plan.tokens):
                tokens_serving.hold(slot, name, adapter, lane)
        for path, module in self.modules.items():
            own = adapter.values.saved.get(path)
            if self._holds(path, MODULE, lane, own is not None):
                module.brings[lane] = own is not None
            for key, tensor in (own or {}).items():
                attribute(module.copies[lane], key).copy_(tensor.detach())

        if self.prompts is not None and self._holds(self.prompts.site, PROMPT, lane, adapter.prompt is not None):
            self.prompts.hold(lane, adapter.prompt)

    def _holds(self, site: str, name: str, lane: int, given: bool) -> bool:
        """Note that a lane gets something, or nothing; returns whether there is something to write."""
        writes = given or (site, name, lane) in self.held
        (self.held.add if given else self.held.discard)((site, name, lane))
        return writes

    def forget(self, slots: Mapping[str, Slot]) -> None:
        """Take it that anything may be in the slots."""
        self.placed, self.holds = {}, {}
        parts = [(site, name) for site, slot in slots.items() for name in slot.features]
        parts += [*((name, TOKENS) for name in self.token_slots), *((path, MODULE) for path in self.modules)]
        if self.prompts is not None:
            self.prompts.forget()
            parts.append((self.prompts.site, PROMPT))
        for name, slot in self.token_slots.items():
            tokens_serving.hold(slot, name, None, self.lanes.count)  # where no adapter's are
        self.held = {(site, name, lane) for site, name in parts for lane in range(self.lanes.count)}

    # --- what rows are named for ---

    @contextmanager
    def naming(self, named: Named, lock: SwapLock) -> Iterator[None]:
        """Name the rows of this context's calls; ``lock`` keeps places as they are while they are read."""
        before = _named.get({})
        _named.set({**before, self.lanes: named})
        try:
            with lock.read():
                self.sync()
            yield
        finally:
            _named.set(before)
            self.lanes.clear()
            if self.lanes in before:
                with lock.read():
                    self.sync()

    def named(self) -> Named | None:
        """What the rows of this context's calls are named for."""
        return _named.get({}).get(self.lanes)

    def before_read(self) -> None:
        """Part of every forward that holds the lock."""
        if self.order is not None:
            self.order.before_read()
        self.sync()

    def sync(self) -> None:
        """Let this thread's calls have the rows that are named in its context."""
        named, lanes, reach = self.named(), self.lanes, self.reach
        if named is None:
            if lanes.held is not None:
                lanes.clear()
            if reach is not None:
                reach.find()
            return
        with torch.inference_mode(False), torch.no_grad():
            if lanes.held is None or lanes.held[:2] != (named, self.version):
                prompted = any(self.placed[name].adapter.prompt is not None for name in named.names())
                tensors, starts = self._tensors(named)
                virtual = None if named.virtual is None or not prompted else named.virtual.to(tensors.picks.device)
                lanes.name(tensors, named.repeats, prompted, virtual)
                lanes.held = (named, self.version, starts)
            if reach is not None and named.ids.ndim == 1:  # what is named for a token acts there
                lanes.act(reach.of_rows(lanes.held[2], named.repeats))

    def _tensors(self, named: Named) -> tuple[RowTensors, RowStarts]:
        lanes, places, count = self.lanes, self.placed, len(named.mixtures)
        end = max((places[n].start + places[n].width for n in named.names()), default=0)
        most = max((sum(places[name].width for name in mixture) for mixture in named.mixtures), default=0)
        sizes = (max(LEAST, end), max(LEAST, most)) if lanes.dynamic else (lanes.max_rank, lanes.max_rank)
        mask, own, ranks = torch.zeros(count, sizes[0]), torch.zeros(count, sizes[1]), torch.zeros(count, sizes[1])
        weights, picks = torch.zeros(count, lanes.count), torch.full((count,), lanes.count)
        packed_starts, own_starts = mask.long(), own.long()
        invocations = dict[Tokens, int]()
        for row, mixture in enumerate(named.mixtures):
            at = 0
            for name, weight in mixture.items():
                place = places[name]
                start, width = place.start, place.width
                mask[row, start : start + width] = own[row, at : at + width] = weight
                ranks[row, at : at + width] = torch.arange(start, start + width)
                if tokens := method_of(place.adapter.config).invocation(place.adapter.config):
                    number = invocations.setdefault(tokens, 1 + len(invocations))
                    packed_starts[row, start : start + width] = own_starts[row, at : at + width] = number
                weights[row, place.lane] = weight
                if place.gains:
                    picks[row] = place.lane
                at += width
        tensors = RowTensors(mask, weights, picks, ranks.long(), own)
        ids, device = named.ids, self.device
        starts = RowStarts(tuple(invocations), packed_starts[ids].to(device), own_starts[ids].to(device))
        return RowTensors._make(values[ids].to(device) for values in tensors), starts


skip_frame(Board.before_read, deep=True)  # Dynamo begins behind it
_MORE = "name fewer at a time, or prepare the model for more (release_hotswap, then prepare_hotswap before compiling)"


def has_gains(adapter: Adapter) -> bool:
    """Whether an adapter has a gain at some site, or rows of an embedding: what a row of a batch has of one alone."""
    return bool(adapter.plan.tokens) or any(v.multiplies() for v in adapter.lowered.values())
