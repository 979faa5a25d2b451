"""Serving: static slots at every site, and swaps that are copies into them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.config import AdapterConfig
from fxpeft.errors import AdapterError, listing
from fxpeft.lock import SwapLock, guard_forwards, unguard_forwards
from fxpeft.methods import method_of
from fxpeft.methods.base import SlotValues
from fxpeft.methods.lora import LoraConfig
from fxpeft.passes.base import PassError, attribute
from fxpeft.passes.live import Container, bare_copy, replace_module, rewrite_module, unbind
from fxpeft.passes.slot import LEAST, ActiveRank, Slot
from fxpeft.passes.torch_private import copy_all
from fxpeft.plan import AdapterPlan, base_state, make_plan
from fxpeft.state import (
    Adapter,
    ModelState,
    Values,
    attach,
    check_together,
    detach,
    drop_state,
    ensure_state,
    hosts,
    placement,
    rebind,
    set_trainable,
    state_of,
    unwrap,
)  # fmt: skip

METHODS = {"lora": frozenset[str](), "lora_bias": frozenset({"shift"})}  # what a slot needs for each


@dataclass
class Lowered:
    """An adapter as slot values, made once and copied at every swap."""

    sites: dict[str, SlotValues]
    plan: AdapterPlan

    def settle(self) -> None:
        """Own contiguous memory, so that a swap is a plain copy."""
        for site, v in self.sites.items():
            if not v.b.is_contiguous():
                self.sites[site] = SlotValues(v.a.contiguous(), v.b.contiguous(), v.d, v.shift)


@dataclass
class Serving:
    """The slots of a prepared model and what is in them.

    Args:
        rank: the active rank; ``None`` in static mode.
        slots: site -> its placeholders. saved: module -> its replaceable copy.
        tensors: dotted parameter name -> its placeholder.
        lowered: adapter -> its slot values. shown: the adapters that are in the slots now.
        dirty: site -> number of leading ranks that may hold something other than zero.
        holds: place of a module or parameter -> adapter whose copy it holds, ``None`` for the base's.
    """

    max_rank: int
    rank: ActiveRank | None
    methods: tuple[str, ...]
    slots: dict[str, Slot] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lowered: dict[str, Lowered] = field(default_factory=dict)
    shown: list[Adapter] = field(default_factory=list)
    dirty: dict[str, int] = field(default_factory=dict)
    holds: dict[str, Adapter | None] = field(default_factory=dict)
    plans: dict[str, AdapterPlan] = field(default_factory=dict)
    lock: SwapLock = field(default_factory=SwapLock)

    def hosts(self) -> set[str]:
        """Names of the modules that have placeholders."""
        return {*self.slots, *self.saved, *(path.rpartition(".")[0] for path in self.tensors)}


def prepare_hotswap(
    model: nn.Module,
    max_rank: int = 128,
    *,
    targets: str | Collection[str] | None = None,
    exclude: str | Collection[str] | None = None,
    methods: Sequence[str] = ("lora",),
    modules_to_save: Sequence[str] = (),
    bias: Literal["none", "all", "lora_only"] = "none",
    rank: Literal["dynamic", "static"] = "dynamic",
) -> None:
    """Give every target a slot. From then on loading, swapping, mixing and switching off are copies.

    Call it before ``torch.compile``. Adapters that the model has already are kept: their sites get
    slots too, and the active ones stay active. Slots are no parameters and in no ``state_dict``.

    Args:
        max_rank: the most ranks a site can hold; those of all active adapters together count.
        targets: as ``target_modules``; the union over all adapters to come. Default: the sites of
            the model's adapters, or ``"all-linear"`` where it has none.
        exclude: as ``exclude_modules``.
        methods: what the slots have to serve: ``"lora"``; ``"lora_bias"`` for LoRA with a bias of B.
        modules_to_save, bias: as in :class:`~fxpeft.LoraConfig`, for adapters that bring them.
        rank: ``"dynamic"``: pay for the rank in use; ``"static"``: pay for ``max_rank``, in a
            graph without symbolic sizes.

    Raises:
        AdapterError: unknown targets or methods, or an adapter that doesn't fit; nothing was changed.
    """
    model = unwrap(model)
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise AdapterError(f"methods: expected some of {', '.join(METHODS)}, found {', '.join(unknown)}")
    if max_rank < LEAST:
        raise AdapterError(f"max_rank: expected at least {LEAST}, found {max_rank}")
    if rank not in ("dynamic", "static"):
        raise AdapterError(f"rank: expected 'dynamic' or 'static', found {rank!r}")
    if torch._inductor.config.freezing:
        raise AdapterError("torch._inductor.config.freezing folds slots into constants, so swaps would have no effect")
    existing: ModelState | None = vars(model).get("_fxpeft")
    if existing is not None and existing.serving is not None:
        raise AdapterError("the model is prepared already; call release_hotswap first to prepare it differently")
    adapters = list(existing.adapters.values()) if existing is not None else []
    if targets is None and not adapters:
        targets = "all-linear"
    kinds = {site: plan.kind for a in adapters for site, plan in a.plan.sites.items()}
    saved = {path for a in adapters for path in a.values.saved}
    paths = {path for a in adapters for path in a.values.tensors}
    if targets is not None or modules_to_save or bias != "none":
        wanted = LoraConfig(
            r=max_rank * _any_rank(model), target_modules=targets if targets is not None else list(kinds),
            exclude_modules=exclude, modules_to_save=list(modules_to_save) or None, bias=bias,
        )  # fmt: skip
        declared = make_plan(model, wanted, heads=False)
        kinds.update({site: plan.kind for site, plan in declared.sites.items()})
        saved.update(declared.saved)
        paths.update(declared.tensors)

    serving = Serving(max_rank, ActiveRank(max_rank) if rank == "dynamic" else None, tuple(methods))
    parts = frozenset[str]().union(*(METHODS[m] for m in methods))
    lowered = {a.name: lower(serving, a, kinds, saved, paths, parts) for a in adapters}
    _check_ranks(serving, [(a, lowered[a.name]) for a in (existing.running() if existing is not None else [])])

    was_bare = existing is None
    state = ensure_state(model)
    for adapter in adapters:
        detach(model, adapter)
    serving.lowered = lowered
    try:
        _bind_slots(model, serving, kinds, saved, paths, parts)
    except PassError as error:
        _unbind_slots(model, serving)
        for adapter in adapters:
            attach(model, adapter)
        rebind(hosts(model, adapters), state.running())
        if was_bare:
            drop_state(model)
        raise AdapterError(str(error)) from None
    state.serving = serving
    guard_forwards(model)
    for low in lowered.values():
        low.settle()
    activate(model, state, state.running())


def release_hotswap(model: nn.Module) -> None:
    """Take the slots out again. The adapters stay, at their own ranks and trainable as before."""
    model, state = unwrap(model), state_of(model)
    release_slots(model, state)
    for adapter in state.adapters.values():
        attach(model, adapter)
    rebind(hosts(model, state.adapters.values()), state.running())
    set_trainable(state)


def release_slots(model: nn.Module, state: ModelState) -> None:
    """Drop the slots; every module has its own class again."""
    serving = _serving(state)
    with serving.lock.write():
        _unbind_slots(model, serving)
        unguard_forwards(model)
        state.serving = None


def hotswap(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    name: str | None = None,
    *,
    config: AdapterConfig | None = None,
    allow_pickle: bool = False,
    check_finite: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> None:
    """Replace an adapter of a prepared model by another one. Nothing recompiles.

    Everything is checked before the first byte of a slot is written. If anything fails, the old
    adapter goes on serving.

    Args:
        source: a folder or hub id as in :func:`fxpeft.load_adapter`, or a state_dict with PEFT's keys.
        name: the adapter to replace; the active one by default.
        config: for a state_dict: its config. Default: the replaced adapter's.
        check_finite: refuse NaN and infinity.

    Raises:
        AdapterError: the model is not prepared, or the adapter doesn't fit its slots.
    """
    model, state = unwrap(model), state_of(model)
    serving = _serving(state)
    if name is None:
        if len(state.active) != 1:
            raise AdapterError(f"{len(state.active)} adapters are active; say which to replace: {list(state.adapters)}")
        name = state.active[0]
    old = state.get(name)
    if isinstance(source, Mapping):
        found = checkpoint.Checkpoint("the state_dict", config or old.config, dict(source))
    else:
        found = checkpoint.read(
            source, allow_pickle=allow_pickle, revision=revision, subfolder=subfolder, token=token,
            local_files_only=local_files_only,
        )  # fmt: skip
    plan = _plan(model, serving, found.config)
    values = checkpoint.assign(model, plan, found, check_finite=check_finite)
    if isinstance(source, Mapping):  # the caller may change its tensors later
        values = _own(values)
    new = Adapter(name, plan, values, strength=old.strength)
    lowered = lower(serving, new)
    before = serving.lowered[name]
    active = [new if n == name else state.adapters[n] for n in state.active]
    check_together(active)
    serving.lowered[name] = lowered
    try:
        if state.enabled and name in state.active:
            activate(model, state, active)
    except BaseException:
        serving.lowered[name] = before
        raise
    state.adapters[name] = new


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Keep swaps of other threads out of a ``with`` block, for instance of a whole ``generate``.

    Single forwards need no help: each call of the model holds the lock on its own, eager or compiled
    with ``torch.compile(model)``. Only where the model is inlined into a larger compiled function,
    that function's call has to be held with this.
    """
    return _serving(state_of(model)).lock.read()


def install(model: nn.Module, state: ModelState, adapter: Adapter) -> None:
    """Add an adapter to the store of a prepared model and make it the active one."""
    serving = _serving(state)
    lowered = lower(serving, adapter)
    lowered.settle()
    serving.lowered[adapter.name] = lowered
    try:
        activate(model, state, [adapter] if state.enabled else [])
    except BaseException:
        del serving.lowered[adapter.name]
        raise
    state.adapters[adapter.name] = adapter
    state.active = [adapter.name]


def lower(
    serving: Serving,
    adapter: Adapter,
    kinds: Collection[str] | None = None,
    saved: Collection[str] | None = None,
    tensors: Collection[str] | None = None,
    parts: frozenset[str] | None = None,
) -> Lowered:
    """An adapter's slot values.

    Raises:
        AdapterError: a site, module or parameter without a slot, a rank above ``max_rank``, or a
            method that the slots were not declared for; all are named.
    """
    method = method_of(adapter.config)
    have = parts if parts is not None else frozenset[str]().union(*(METHODS[m] for m in serving.methods))
    places = [
        ("targets", adapter.values.sites, kinds if kinds is not None else serving.slots),
        ("modules_to_save", adapter.values.saved, saved if saved is not None else serving.saved),
        ("bias", adapter.values.tensors, tensors if tensors is not None else serving.tensors),
    ]
    problems = [f"{n}: has no slot; declare it in {what}" for what, own, slots in places for n in own if n not in slots]
    lowered: dict[str, SlotValues] = {}
    for site, parameters in adapter.values.sites.items():
        plan = adapter.plan.sites[site]
        if plan.rank > serving.max_rank:
            problems.append(f"{site}: rank {plan.rank} is above max_rank {serving.max_rank}")
            continue
        lowered[site] = method.lower(plan, parameters)
        if lowered[site].shift is not None and "shift" not in have:
            problems.append(f"{site}: needs a slot with a shift; declare methods=('lora', 'lora_bias')")
    if problems:
        raise AdapterError(
            f"adapter {adapter.name!r} doesn't fit the slots; nothing was changed.\n{listing(problems)}\n"
            "Prepare the model for it: release_hotswap(model), then prepare_hotswap(...) before compiling."
        )
    return Lowered(lowered, adapter.plan)


def activate(model: nn.Module, state: ModelState, adapters: list[Adapter]) -> None:
    """Put adapters into the slots, side by side along the rank; none: the bare model.

    On any error the slots hold what they held before.
    """
    serving = _serving(state)
    check_together(adapters)
    chosen = [(adapter, serving.lowered[adapter.name]) for adapter in adapters]
    _check_ranks(serving, chosen)
    with serving.lock.write():
        try:
            _show(model, serving, chosen)
        except BaseException:
            before = [(a, serving.lowered[a.name]) for a in serving.shown if serving.lowered.get(a.name)]
            serving.dirty = dict.fromkeys(serving.slots, serving.max_rank)
            serving.holds = {}
            _show(model, serving, before)
            raise
        serving.shown = list(adapters)


def _check_ranks(serving: Serving, chosen: Iterable[tuple[Adapter, Lowered]]) -> None:
    total: dict[str, int] = {}
    for _, lowered in chosen:
        for site, value in lowered.sites.items():
            total[site] = total.get(site, 0) + value.d.numel()
    over = [f"{site}: {rank} ranks" for site, rank in total.items() if rank > serving.max_rank]
    if over:
        raise AdapterError(
            f"the active adapters need more than max_rank {serving.max_rank} ranks together:\n{listing(over)}\n"
            "Activate fewer at a time, or prepare with a larger max_rank."
        )


def _show(model: nn.Module, serving: Serving, chosen: list[tuple[Adapter, Lowered]]) -> None:
    """Write the slots. Everything was checked; only copies are left."""
    destinations: list[Tensor] = []
    sources: list[Tensor] = []
    used: dict[str, int] = {}
    for adapter, lowered in chosen:
        for site, value in lowered.sites.items():
            slot, start = serving.slots[site], used.get(site, 0)
            count = value.d.numel()
            destinations += (t.narrow(0, start, count) for t in (slot.a, slot.b, slot.d))
            sources += (value.a, value.b, value.d if adapter.strength == 1 else value.d * adapter.strength)
            used[site] = start + count
    highest = max(used.values(), default=0)
    active = serving.max_rank if serving.rank is None else max(highest, LEAST)
    for site, slot in serving.slots.items():
        start = used.get(site, 0)
        stale = min(serving.dirty.get(site, 0), active)
        if stale > start:  # old ranks that this swap would compute with: zero them, they may even be NaN
            for tensor in (slot.a, slot.b, slot.d):
                tensor.narrow(0, start, stale - start).zero_()
        serving.dirty[site] = max(start, serving.dirty.get(site, 0) if serving.dirty.get(site, 0) > active else 0)
    copy_all(destinations, sources)
    _show_shifts(serving, chosen)
    _show_copies(model, serving, [adapter for adapter, _ in chosen])
    if serving.rank is not None:
        serving.rank.set(active)


def _show_shifts(serving: Serving, chosen: list[tuple[Adapter, Lowered]]) -> None:
    for site, slot in serving.slots.items():
        if "shift" not in slot._buffers:
            continue
        slot.shift.zero_()
        for adapter, lowered in chosen:
            value = lowered.sites.get(site)
            if value is not None and value.shift is not None:
                slot.shift.add_((value.shift * adapter.strength).to(slot.shift))


def _show_copies(model: nn.Module, serving: Serving, adapters: list[Adapter]) -> None:
    """Modules and parameters that an adapter brings, or the base's own; copied where that changes."""
    for path, module in serving.saved.items():
        owner = next((a for a in adapters if path in a.values.saved), None)
        if path in serving.holds and serving.holds[path] is owner:
            continue
        own = base_state(model.get_submodule(path)) if owner is None else owner.values.saved[path]
        with torch.no_grad():
            for key, tensor in own.items():
                attribute(module, key).copy_(tensor)
        serving.holds[path] = owner
    for path, tensor in serving.tensors.items():
        owner = next((a for a in adapters if path in a.values.tensors), None)
        if path in serving.holds and serving.holds[path] is owner:
            continue
        site, _, leaf = path.rpartition(".")
        place = attribute(model, f"{site}.slot.{leaf}" if site else f"slot.{leaf}")
        with torch.no_grad():
            place.copy_(attribute(model, path) if owner is None else owner.values.tensors[path])
        serving.holds[path] = owner


def _plan(model: nn.Module, serving: Serving, config: AdapterConfig) -> AdapterPlan:
    """The plan for a config; adapters that share one share the search for its sites."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in serving.plans:
        serving.plans[key] = make_plan(model, config, heads=False)
    plan = serving.plans[key]
    return AdapterPlan(plan.config, plan.sites, plan.saved, plan.tensors)


def _own(values: Values) -> Values:
    return Values(
        {site: {k: v.detach().clone() for k, v in parts.items()} for site, parts in values.sites.items()},
        {path: {k: v.detach().clone() for k, v in parts.items()} for path, parts in values.saved.items()},
        {path: v.detach().clone() for path, v in values.tensors.items()},
    )


def _serving(state: ModelState) -> Serving:
    if state.serving is None:
        raise AdapterError("the model has no slots: call prepare_hotswap(model) before compiling it")
    return state.serving


def _any_rank(model: nn.Module) -> int:
    """A multiple of every group count, so that a plan for the slots passes every kind's rank check."""
    product = 1
    for module in model.modules():
        groups = getattr(module, "groups", 1)
        if isinstance(groups, int) and product % groups:
            product *= groups
    return product


def _bind_slots(
    model: nn.Module,
    serving: Serving,
    kinds: Mapping[str, object],
    saved: Collection[str],
    paths: Collection[str],
    parts: frozenset[str],
) -> None:
    redirects: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for path in paths:
        site, _, leaf = path.rpartition(".")
        own = attribute(model, path).detach()
        serving.tensors[path] = own
        redirects.setdefault(site, {})[leaf] = (leaf, own.clone())
    for path in saved:
        module = model.get_submodule(path)
        unbind(module)
        copied = bare_copy(module).requires_grad_(False).eval()
        serving.saved[path] = copied
        holder = Container()
        holder.add_module("module", _transient(copied))
        module.add_module("slot", holder)
        replace_module(module, "slot.module")
    for site in [*kinds, *(s for s in redirects if s not in kinds)]:
        module = model.get_submodule(site)
        unbind(module)
        rewrites = []
        place: Container = Container()
        if site in kinds:
            device, dtype = placement(module, model, autocast=False)
            place = serving.slots[site] = Slot(
                kinds[site], serving.max_rank, serving.rank, shift="shift" in parts, device=device, dtype=dtype  # type: ignore[arg-type]
            )
            rewrites.append(place.rewrite())
        for leaf, (_, value) in redirects.get(site, {}).items():
            place.register_buffer(leaf, value, persistent=False)
        module.add_module("slot", place)
        rewrite_module(module, rewrites, name=site, redirects=redirects.get(site), container="slot")


def _transient(module: nn.Module) -> nn.Module:
    """Turn a copy's parameters into buffers that no state_dict holds."""
    for part in module.modules():
        for key, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[key]
                part.register_buffer(key, parameter.detach(), persistent=False)
        part._non_persistent_buffers_set.update(part._buffers)
    return module


def _unbind_slots(model: nn.Module, serving: Serving) -> None:
    for name in serving.hosts():
        module = model.get_submodule(name)
        unbind(module)
        module._modules.pop("slot", None)
