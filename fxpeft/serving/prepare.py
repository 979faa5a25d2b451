"""Serving: static slots at every site, prepared before compiling; adapters then come and go by copies."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxpeft.adapters.change import changes, changing, ordinary
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.penalty import unwatch_loss, watch_loss
from fxpeft.adapters.state import (
    Adapter,
    ModelState,
    attach,
    check_together,
    detach,
    drop_state,
    ensure_state,
    find_state,
    hosts,
    is_prepared,
    placement,
    rebind,
    set_trainable,
    state_of,
    unwrap,
)  # fmt: skip
from fxpeft.checkpoint import peft as checkpoint
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of, slot_needs
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.fast_path import fused_above, switch_off
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError
from fxpeft.passes.live import Container, bare_copy, replace_module, rewrite_module, unbind
from fxpeft.passes.live.parameters import read_module, slot_rewrite
from fxpeft.passes.slots.slot import LEAST, ActiveRank, Slot
from fxpeft.passes.targets.terms import Pattern
from fxpeft.serving import prompts as prompts_serving
from fxpeft.serving.base_loads import unwatch_loads, watch_loads
from fxpeft.serving.guard import ModelLock, drain, guard_forwards, unguard_forwards
from fxpeft.serving.lock import TIMEOUT
from fxpeft.serving.swap import Serving, activate, check_gains, check_ranks, lower, serving_of, settle
from fxpeft.targets.experts import converted
from fxpeft.targets.parameters import check_hosts
from fxpeft.targets.sites import AdapterPlan, base_value, base_values, make_plan, saved_modules


@changes
def prepare_hotswap(
    model: nn.Module,
    max_rank: int = 128,
    *,
    targets: str | Pattern | Collection[str] | None = None,
    exclude: str | Pattern | Collection[str] | None = None,
    methods: Sequence[str] = ("lora",),
    modules_to_save: Sequence[str] = (),
    bias: Literal["none", "all", "lora_only"] = "none",
    rank: Literal["dynamic", "static"] = "dynamic",
    num_virtual_tokens: int | None = None,
    target_parameters: str | Pattern | Collection[str] | None = None,
    lock_timeout: float = TIMEOUT,
    hold_generate: bool = True,
) -> None:
    """Give every target a slot. From then on loading, swapping, mixing and switching off are copies.

    Call it before ``torch.compile``. Adapters that the model has already are kept: their sites get
    slots too, and the active ones stay active. Slots are no parameters and in no ``state_dict``.

    Args:
        max_rank: the most ranks a site can hold; those of all active adapters together count.
        targets: as ``target_modules``, patterns too; the union over all adapters to come. Default: the sites of
            the model's adapters, or ``"all-linear"`` where it has none.
        exclude: as ``exclude_modules``.
        methods: what the slots have to serve: ``"lora"``, ``"lora_bias"`` (a bias of B), ``"dora"``,
            ``"ia3"``, ``"adalora"``, ``"prompt_tuning"`` and ``"p_tuning"`` or ``"prefix_tuning"``. Where
            only LoRA is declared, the graph holds no gain and no shift.
        target_parameters: as in :class:`~fxpeft.LoraConfig`, for adapters of experts and other parameters.
        num_virtual_tokens: length of every prompt to come, for the prompt methods.
        modules_to_save, bias: as in :class:`~fxpeft.LoraConfig`, for adapters that bring them.
        rank: ``"dynamic"``: pay for the rank in use; ``"static"``: pay for ``max_rank``, in a
            graph without symbolic sizes.
        lock_timeout: seconds that a swap waits for forwards, or a forward for a swap, before it gives up.
        hold_generate: let a whole ``generate`` hold swaps off, so that all tokens come from one adapter.

    Raises:
        AdapterError: unknown targets or methods, or an adapter that doesn't fit; nothing was changed.
        LockTimeout: a forward of another thread went on for longer than ``lock_timeout``; nothing was changed.
    """
    model = unwrap(model)
    known = slot_needs()
    unknown = [m for m in methods if m not in known]
    if isinstance(methods, str) or unknown:
        found = repr(methods) if isinstance(methods, str) else ", ".join(unknown)
        raise AdapterError(f"methods: expected a sequence of some of {', '.join(known)}, found {found}")
    if max_rank < LEAST:
        raise AdapterError(f"max_rank: expected at least {LEAST}, found {max_rank}")
    if rank not in ("dynamic", "static"):
        raise AdapterError(f"rank: expected 'dynamic' or 'static', found {rank!r}")
    if torch._inductor.config.freezing:
        raise AdapterError("torch._inductor.config.freezing folds slots into constants, so swaps would have no effect")
    existing = find_state(model)
    if is_prepared(model):
        raise AdapterError("the model is prepared already; call release_hotswap first to prepare it differently")
    adapters = list(existing.adapters.values()) if existing is not None else []
    serving = Serving(
        max_rank, ActiveRank(max_rank) if rank == "dynamic" else None, tuple(methods),
        *_declare(model, adapters, targets, exclude, modules_to_save, bias, methods, target_parameters),
        lock=ModelLock(lock_timeout, hold_generate),
    )  # fmt: skip
    prompts = prompts_serving.declare(model, methods, num_virtual_tokens, adapters)
    if prompts is not None:
        serving.prompts = prompts_serving.PromptSlot.of(model, *prompts)
    # everything that can be refused is refused on copies, before the model is touched
    trial = [lower(model, serving, Adapter(a.name, a.plan, a.current(), a.strength)) for a in adapters]
    active = existing.active if existing is not None else []
    check_ranks(serving, [a for a in trial if a.name in active])
    check_gains([a for a in trial if a.name in active])

    with serving.lock.write():  # nobody else has it; from here on they wait at it
        try:
            guard_forwards(model, serving.lock, serving.locked())
            drain(model, serving.lock, serving.locked())
            _enter_slots(model, serving, adapters)
        except BaseException as error:
            unguard_forwards(model)
            if isinstance(error, PassError):
                raise AdapterError(str(error)) from None
            raise


def _enter_slots(model: nn.Module, serving: Serving, adapters: list[Adapter]) -> None:
    """From the adapters' own parameters to slots; on an error everything is as it was."""
    bare = find_state(model) is None
    state = ensure_state(model)
    try:
        for adapter in adapters:
            detach(model, adapter)
        _bind_slots(model, serving)
        watch_loads(model)
        state.serving = serving
        for adapter in adapters:
            settle(lower(model, serving, adapter))
        activate(model, state, state.running())
    except BaseException:
        _leave_slots(model, state, serving)
        if bare:
            drop_state(model)
        raise
    unwatch_loss(model)


def _declare(
    model: nn.Module,
    adapters: list[Adapter],
    targets: str | Pattern | Collection[str] | None,
    exclude: str | Pattern | Collection[str] | None,
    modules_to_save: Sequence[str],
    bias: Literal["none", "all", "lora_only"],
    methods: Sequence[str],
    parameters: str | Pattern | Collection[str] | None,
) -> tuple[dict[str, Any], frozenset[str], frozenset[str]]:
    """Sites, modules and parameters of the adapters that are there and of those that were declared."""
    kinds = {s: p.kind for a in adapters if not method_of(a.config).whole for s, p in a.plan.sites.items()}
    saved = {path for a in adapters for path in a.values.saved}
    tensors = {path for a in adapters for path in a.values.tensors}
    if targets is None and not parameters and set(methods) <= set(prompts_serving.PROMPT_METHODS):
        if bias != "none":
            raise AdapterError(f"bias: expected 'none' with {', '.join(methods)}: prompts bring none; found {bias!r}")
        saved.update(saved_modules(model, modules_to_save))
        return kinds, frozenset(saved), frozenset(tensors)
    if targets is None and not kinds:
        targets = "all-linear"
    if targets is not None or modules_to_save or bias != "none" or parameters:
        groups = [g for m in model.modules() if isinstance(g := getattr(m, "groups", None), int)]
        wanted = LoraConfig(
            r=math.lcm(*groups), exclude_modules=exclude, modules_to_save=list(modules_to_save) or None, bias=bias,
            target_modules=[s for s, kind in kinds.items() if not kind.leaf] if targets is None else targets,
            target_parameters=parameters,
        )  # fmt: skip
        declared = make_plan(model, converted(model, wanted), heads=False)
        kinds.update({site: plan.kind for site, plan in declared.sites.items()})
        saved.update(declared.saved)
        tensors.update(declared.tensors)
    check_hosts(kinds, saved, tensors)
    return kinds, frozenset(saved), frozenset(tensors)


@changes
def release_hotswap(model: nn.Module) -> None:
    """Take the slots out again. The adapters stay, at their own ranks and trainable as before."""
    model, state = unwrap(model), state_of(model)
    serving = serving_of(state)
    _leave_slots(model, state, serving)
    if not state.adapters:
        drop_state(model)
    unguard_forwards(model)


def _leave_slots(model: nn.Module, state: ModelState, serving: Serving) -> None:
    """From slots back to the adapters' own parameters."""
    release_slots(model, state, serving)
    for adapter in state.adapters.values():
        if not adapter.parts:
            attach(model, adapter)
    rebind(hosts(model, state.adapters.values()), state.running())
    set_trainable(state)
    watch_loss(model, state)


def release_slots(model: nn.Module, state: ModelState, serving: Serving) -> None:
    """Drop the slots; every module has its own forward again, and is still locked."""
    serving.lock.repair = None
    _unbind_slots(model, serving)
    unwatch_loads(model)
    state.serving = None
    for adapter in state.adapters.values():
        adapter.lowered, adapter.copies, adapter.prompt = {}, None, None


@ordinary()
def hotswap(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    name: str | None = None,
    *,
    config: AdapterConfig | None = None,
    allow_pickle: bool = False,
    check_finite: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = False,
) -> None:
    """Replace an adapter of a prepared model by another one. Nothing recompiles.

    Everything is checked before the first byte of a slot is written. If anything fails, the old
    adapter goes on serving.

    Args:
        source: a folder or hub id as in :func:`fxpeft.load_adapter`, or a state_dict with PEFT's keys.
        name: the adapter to replace; the active one by default.
        config: for a state_dict: its config. Default: the replaced adapter's.
        check_finite: refuse NaN and infinity.
        key_mapping, strict: as in :func:`fxpeft.load_adapter`.

    Raises:
        AdapterError: the model is not prepared, or the adapter doesn't fit its slots.
    """
    model, state = unwrap(model), state_of(model)
    serving_of(state)
    _replaced(state, name)  # what is wrong with it is told before files are read
    given = None if isinstance(source, Mapping) else checkpoint.read(
        source, allow_pickle=allow_pickle, revision=revision, subfolder=subfolder, token=token,
        local_files_only=local_files_only, strict=strict,
    )  # fmt: skip
    with changing(model):
        state = state_of(model)
        old = _replaced(state, name)
        found = given or checkpoint.Checkpoint("the state_dict", config or old.config, dict(source))  # type: ignore[arg-type]
        found = in_layout_of(model, found, key_mapping=key_mapping)
        plan = plan_for(model, serving_of(state), found.config)
        values = checkpoint.assign(model, plan, found, check_finite=check_finite)
        replace_adapter(model, state, Adapter(old.name, plan, values, old.strength), owned=given is not None)


def _replaced(state: ModelState, name: str | None) -> Adapter:
    """The adapter that a hotswap replaces."""
    if name is None:
        if len(state.active) != 1:
            raise AdapterError(f"{len(state.active)} adapters are active; say which to replace: {list(state.adapters)}")
        name = state.active[0]
    old = state.get(check_adapter_name(name))
    state.check_unfolded([name], "it can't be replaced")
    return old


@changes
def replace_adapter(model: nn.Module, state: ModelState, adapter: Adapter, *, owned: bool) -> None:
    """Put an adapter in the place of the one of its name in a prepared model, active where that is.

    Args:
        owned: nobody else can write to its values' memory.
    """
    new = lower(model, serving_of(state), adapter)
    if not owned:
        settle(new)
    active = [new if n == new.name else state.adapters[n] for n in state.active]
    check_together(active)
    if state.enabled and new.name in state.active:
        activate(model, state, active, fresh=new)
    state.adapters[new.name] = new


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Keep swaps of other threads out of a ``with`` block, so that all of it sees one adapter.

    Calls of the model, of its parts and of ``generate`` need no help: each holds the lock on its own, eager or
    compiled with ``torch.compile(model)``. Only where the model is inlined into a larger compiled function, that
    function's call has to be held with this. Inside the block this thread can't swap, and must not wait for other
    threads that call the model: they wait for a waiting swap, which waits for this block.

    Raises:
        LockTimeout: a swap took longer than ``prepare_hotswap(..., lock_timeout=)``.
    """
    return serving_of(state_of(model)).lock.read()


@changes
def install(model: nn.Module, state: ModelState, adapter: Adapter) -> None:
    """Add an adapter to the store of a prepared model and make it the active one."""
    if adapter.name in state.adapters:  # another thread was first
        raise AdapterError(f"there is an adapter named {adapter.name!r} already")
    settle(lower(model, serving_of(state), adapter))
    activate(model, state, [adapter] if state.enabled else [])
    state.adapters[adapter.name] = adapter
    state.active = [adapter.name]


@changes
def rescale(model: nn.Module, state: ModelState, name: str, strength: float) -> None:
    """Change an adapter's strength in the slots."""
    changed = lower(model, serving_of(state), replace(state.get(name), strength=strength))
    if state.enabled and name in state.active:
        activate(model, state, [changed if n == name else state.adapters[n] for n in state.active])
    state.adapters[name] = changed


def plan_for(model: nn.Module, serving: Serving, config: AdapterConfig) -> AdapterPlan:
    """The plan for a config; adapters that share one share the search for its sites."""
    key = repr(config)
    found = serving.plans.recent(key)
    if found is None:
        found = serving.plans[key] = make_plan(model, config, heads=False, of_file=True)
    return found


def _bind_slots(model: nn.Module, serving: Serving) -> None:
    if serving.prompts is not None:
        host = submodule(model, serving.prompts.site)
        unbind(host)
        host.add_module("slot", serving.prompts)
    redirects: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for path in serving.tensors:
        site, _, leaf = path.rpartition(".")
        redirects.setdefault(site, {})[leaf] = (leaf, base_value(model, path).detach().clone())
    for path in serving.saved:
        module = submodule(model, path)
        unbind(module)
        copied = bare_copy(module)
        copied.load_state_dict({k: v.detach().clone() for k, v in base_values(module).items()}, assign=True)
        serving.copies[path] = _transient(copied)
        holder = Container()
        holder.add_module("module", serving.copies[path])
        module.add_module("slot", holder)
        replace_module(module, "slot.module")
    _bind_parameters(model, serving)
    for site in dict.fromkeys((*(s for s, kind in serving.kinds.items() if not kind.leaf), *redirects)):
        module = submodule(model, site)
        unbind(module)
        rewrites, place = [], Container()
        if site in serving.kinds:
            device, dtype = placement(module, model, autocast=False)
            place = serving.slots[site] = Slot(
                serving.kinds[site], serving.max_rank, serving.rank, features=serving.features, device=device,
                dtype=dtype,
            )  # fmt: skip
            rewrites.append(place.rewrite())
        for leaf, (_, value) in redirects.get(site, {}).items():
            place.register_buffer(leaf, value, persistent=False)
        module.add_module("slot", place)
        rewrite_module(module, rewrites, name=site, redirects=redirects.get(site), container="slot")
    for module in fused_above(model, serving.hosts()).values():
        switch_off(module)


def _bind_parameters(model: nn.Module, serving: Serving) -> None:
    """Slots of parameters lie side by side in their module's container."""
    hosts: dict[str, list[str]] = {}
    for site, kind in serving.kinds.items():
        if kind.leaf:
            hosts.setdefault(kind.host(site), []).append(site)
    for name, sites in hosts.items():
        module, place, rewrites = submodule(model, name), Container(), {}
        unbind(module)
        for site in sites:
            kind = serving.kinds[site]
            device, dtype = placement(module, model, autocast=False, leaf=kind.leaf)
            slot = serving.slots[site] = Slot(kind, serving.max_rank, serving.rank, device=device, dtype=dtype)
            place.add_module(kind.leaf, slot)
            rewrites[kind.leaf] = [slot_rewrite(slot, kind.leaf)]
        module.add_module("slot", place)
        read_module(module, rewrites, name=name)


def _transient(module: nn.Module) -> nn.Module:
    """Turn a copy's parameters into buffers that no state_dict holds."""
    for part in module.modules():
        for key, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[key]
                part.register_buffer(key, parameter.detach())
        part._non_persistent_buffers_set.update(part._buffers)
    return module


def _unbind_slots(model: nn.Module, serving: Serving) -> None:
    for name in serving.hosts():
        module = submodule(model, name)
        unbind(module)
        module._modules.pop("slot", None)
    for module in fused_above(model, serving.hosts()).values():
        unbind(module)
    if serving.prompts is not None:
        prompts_serving.release(model, serving.prompts)
