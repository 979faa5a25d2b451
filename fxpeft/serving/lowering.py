"""An adapter's slot values, for slots as they were declared and beside the adapters that go into them with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from torch import nn

from fxpeft.adapters.state import Adapter, ModelState
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of, slot_needs
from fxpeft.methods.base import Base, SlotValues
from fxpeft.passes.base import PassError
from fxpeft.passes.slots import kronecker
from fxpeft.passes.slots.rotation import fitted
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.slots.tokens import TokenSlot
from fxpeft.passes.targets.kinds import Kind
from fxpeft.serving import prompts as prompts_serving
from fxpeft.serving import tokens as tokens_serving
from fxpeft.serving.board import Board
from fxpeft.serving.packing import settle
from fxpeft.serving.places import check_finite
from fxpeft.serving.staging import ACCELERATORS


class Declared(Protocol):
    """What slots were declared for; :class:`~fxpeft.serving.swap.Serving` has it."""

    max_rank: int
    methods: tuple[str, ...]
    kinds: Mapping[str, Kind]
    saved: frozenset[str]
    tensors: frozenset[str]
    prompts: prompts_serving.PromptSlot | None
    slots: dict[str, Slot]
    token_slots: dict[str, TokenSlot]
    board: Board | None
    block: int
    factor: int

    def place(self, site: str) -> kronecker.Shapes | None:
        """The shapes of W1 and W2 where a site's slot has a place for a Kronecker product."""


def lower(model: nn.Module, serving: Declared, adapter: Adapter, taken: Mapping[str, str] | None = None) -> Adapter:
    """Give an adapter its slot values at its strength. The model is not touched.

    Args:
        taken: site -> which adapter is in its place for a product.

    Raises:
        AdapterError: a site, module or parameter without a slot, a rank above ``max_rank``, or a
            method that the slots were not declared for; all are named.
    """
    method, values, taken = method_of(adapter.config), adapter.values, taken or {}
    sites = {} if method.unlowered else values.sites
    biases, weights = ([p for p in values.tensors if p.endswith(".bias") is b] for b in (True, False))
    places: list[tuple[str, Iterable[str], Collection[str]]] = [
        ("declare it in targets, or in target_parameters where it is a parameter", sites, serving.kinds),
        ("declare it in modules_to_save", values.saved, serving.saved),
        ("declare it in bias", biases, serving.tensors),
        ("an adapter with a weight of its own has to be there before prepare_hotswap", weights, serving.tensors),
    ]
    problems = [f"{n}: has no slot; {how}" for how, own, slots in places for n in own if n not in slots]
    needed = method.declared(adapter.config)
    if needed not in serving.methods and not method.unlowered:
        problems.append(f"its method, {needed}: declare methods={(*serving.methods, needed)}")
    brings, lowered = values.own(), dict[str, SlotValues]()
    problems += prompts_serving.lower(serving.prompts, adapter)
    problems += tokens_serving.problems(serving.token_slots, adapter)
    for site, parameters in sites.items():
        place = None if site in taken else serving.place(site)
        base, plan = Base(model, brings.get(site, {}), site, values.shared, place), adapter.site_plan(site)
        slot = serving.slots.get(site)
        if slot is not None and (slot.features or method.follows_base) and slot.a.device.type in ACCELERATORS:
            parameters = {name: value.to(slot.a.device) for name, value in parameters.items()}
        try:
            value = method.lower(plan, parameters, base)
            if value.rotation is not None and site in serving.kinds:
                value = value._replace(rotation=fitted(value.rotation, serving.kinds[site], serving.block))
            lowered[site] = value
        except PassError as error:
            problems.append(f"{site}: {error}")
        else:
            if (rank := lowered[site].d.numel()) <= serving.max_rank:
                continue
            problems.append(f"{site}: rank {rank} is above max_rank {serving.max_rank}")
        if site in taken:
            problems[-1] += f"; the place for a product has {taken[site]!r}"
        elif plan.factor and serving.board is None:
            base = replace(base, place=kronecker.shapes(plan.kind, plan.factor))
            with suppress(PassError):
                if method.lower(plan, parameters, base).w1 is not None:
                    problems[-1] += f"; with lokr_factor={plan.factor} it needs no ranks"
    if serving.board is not None:
        problems += check_finite(lowered)
    if problems:
        raise AdapterError(
            f"adapter {adapter.name!r} doesn't fit the slots; nothing was changed.\n{listing(problems)}\n"
            "Prepare the model for it: release_hotswap(model), then prepare_hotswap(...) before compiling."
        )
    adapter.lowered, adapter.copies, adapter.stale = lowered, None, False
    return adapter


def lower_again(state: ModelState) -> None:
    """The base has other weights: have adapters that follow from them lowered anew before they are shown next."""
    needs = slot_needs()
    for adapter in state.adapters.values():
        method = method_of(adapter.config)
        adapter.stale = method.follows_base or bool(needs.get(method.declared(adapter.config)))


def side_by_side(model: nn.Module, serving: Declared, adapters: list[Adapter]) -> list[Adapter]:
    """The adapters as they go into the slots together: a place for a product holds one, and others' go into ranks.

    Raises:
        AdapterError: these are more than ``max_rank``.
    """
    if len(adapters) < 2 or not serving.factor:
        return adapters
    taken, found = dict[str, str](), list[Adapter]()
    for adapter in adapters:
        own = [site for site, value in adapter.lowered.items() if value.w1 is not None]
        if any(site in taken for site in own):
            adapter = lower(model, serving, replace(adapter, settled=False, room=None), taken)
            adapter = settle(adapter, serving.slots) if serving.slots else adapter
        found.append(adapter)
        taken = {**dict.fromkeys(own, adapter.name), **taken}
    return found
