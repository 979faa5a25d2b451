"""Slots into the modules of a model, and out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxpeft.model.fast_path import fused_above, switch_off
from fxpeft.model.placement import parted, placement
from fxpeft.model.progress import progress
from fxpeft.model.walk import base_value, base_values, output_head
from fxpeft.model.wrappers import submodule
from fxpeft.passes.live import Container, bare_copy, replace_module, rewrite_module, unbind
from fxpeft.passes.live.lane_modules import LaneModules
from fxpeft.passes.live.parameters import read_module, slot_rewrite
from fxpeft.passes.slots.lanes import lane_rewrite
from fxpeft.passes.slots.parted import parted_rewrite
from fxpeft.passes.slots.reach import ReachAt
from fxpeft.passes.slots.room import lay_out
from fxpeft.passes.slots.slot import EXACT, NEUTRAL, Slot
from fxpeft.serving import prompts as prompts_serving
from fxpeft.serving.swap import Serving


def bind_slots(model: nn.Module, serving: Serving) -> None:
    if serving.prompts is not None:
        host = submodule(model, serving.prompts.site)
        unbind(host)
        host.add_module("slot", serving.prompts)
    redirects: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for path in serving.tensors:
        site, _, leaf = path.rpartition(".")
        redirects.setdefault(site, {})[leaf] = (leaf, base_value(model, path).detach().clone())
    for path in serving.saved:
        _bind_copies(model, serving, path)
    _make_slots(model, serving)
    _bind_parameters(model, serving)
    modules = (s for s, kind in serving.kinds.items() if not kind.leaf)
    sites = dict.fromkeys((*modules, *redirects, *serving.token_slots))
    head = output_head(model)
    for site in progress(sites, "slots"):
        module = submodule(model, site)
        unbind(module)
        rewrites, place = [], Container()
        if site in serving.kinds:
            place = serving.slots[site]
            make = parted_rewrite if parted(module) else lane_rewrite if place.lanes is not None else Slot.live_rewrite
            rewrites.append(make(place))
        if site in serving.token_slots:
            place.add_module("tokens", serving.token_slots[site])
            rewrites.append(serving.token_slots[site].rewrite())
        for leaf, (_, value) in redirects.get(site, {}).items():
            place.register_buffer(leaf, value, persistent=False)
        module.add_module("slot", place)
        alone = bool(rewrites) and module is head
        rewrite_module(
            module, rewrites, name=site, redirects=redirects.get(site), container="slot", alone=alone,
            rows=serving.board is not None,
        )  # fmt: skip
    for module in fused_above(model, serving.hosts()).values():
        switch_off(module)


def _bind_copies(model: nn.Module, serving: Serving, path: str) -> None:
    """A replaceable copy of a module answers for it; where rows have their own, one for each lane and none."""
    module, board = submodule(model, path), serving.board
    unbind(module)
    serving.copies[path] = _copy(module)
    holder = Container()
    if board is not None and path not in board.for_all:
        own = [_copy(module) for _ in range(board.lanes.count + 1)]
        holder = board.modules[path] = LaneModules(serving.copies[path], own, board.lanes, path)
    else:
        holder.add_module("module", serving.copies[path])
    module.add_module("slot", holder)
    replace_module(module, "slot.module", called="slot" if path in getattr(board, "modules", ()) else "")


def _copy(module: nn.Module) -> nn.Module:
    """A module that computes with values of its own, which are no parameters; now those of the base."""
    copied = bare_copy(module)
    copied.load_state_dict({k: v.detach().clone() for k, v in base_values(module).items()}, assign=True)
    return _transient(copied)


def _make_slots(model: nn.Module, serving: Serving) -> None:
    """Slots for all sites in one piece of memory, those of one name in all layers side by side.

    So an adapter of the same rank everywhere, whichever names it targets, goes into them in a handful of copies.
    """
    wanted: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype, torch.device]] = {}
    lanes = None if serving.board is None else serving.board.lanes
    for site, kind in serving.kinds.items():
        module = submodule(model, kind.host(site))
        device, dtype = placement(module, model, autocast=False, leaf=kind.leaf)
        features = () if kind.leaf else serving.features
        for name, shape in Slot.shapes(
            kind, serving.max_rank, features, lanes.count if lanes else 1, serving.block, serving.factor
        ).items():
            wanted[site, name] = shape, torch.float32 if name in EXACT else dtype, device
    order = sorted(wanted, key=lambda key: (key[1], key[0].rpartition(".")[2]))
    room, made = lay_out((wanted[key] for key in order), apart=True)
    memory = dict(zip(order, made, strict=True))
    for site, kind in serving.kinds.items():
        own = {name: memory[site, name] for name in ("a", "b", *NEUTRAL) if (site, name) in memory}
        features = () if kind.leaf else serving.features
        serving.slots[site] = Slot(
            kind, serving.max_rank, serving.rank, features=features, memory=(room, own), lanes=lanes, site=site,
            reach=ReachAt(serving.reach.calls, site) if serving.reach is not None and kind.is_linear else None,
            block=serving.block, factor=serving.factor,
        )  # fmt: skip


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
            leaf, slot = serving.kinds[site].leaf, serving.slots[site]
            place.add_module(leaf, slot)
            rewrites[leaf] = [slot_rewrite(slot, leaf)]
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


def unbind_slots(model: nn.Module, serving: Serving) -> None:
    for name in serving.hosts():
        module = submodule(model, name)
        unbind(module)
        module._modules.pop("slot", None)
    for module in fused_above(model, serving.hosts()).values():
        unbind(module)
    if serving.prompts is not None:
        prompts_serving.release(model, serving.prompts)
