"""Adapters as modules of their own below those they adapt, and the forwards that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxpeft.adapters.state import Adapter, ModelState, state_of
from fxpeft.adapters.tensor_parallel import alike, parted_values
from fxpeft.adapters.values import tie
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import SharedPart, SiteAdapter
from fxpeft.methods.tokens import TokenPart
from fxpeft.model.fast_path import fused_above, is_fused, switch_off
from fxpeft.model.placement import parted
from fxpeft.model.progress import progress
from fxpeft.model.walk import output_head
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import attribute
from fxpeft.passes.container import active_name
from fxpeft.passes.live import Container, bare_copy, feed_module, replace_module, rewrite_module, unbind
from fxpeft.passes.live.parameters import read_module
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.reach import Reach, ReachAt
from fxpeft.targets.parameters import ONE_REWRITE


def hosts(model: nn.Module, adapters: Iterable[Adapter]) -> dict[str, nn.Module]:
    """Every module that the adapters touch, by name, and every one whose fast path would pass them by."""
    names = {name for adapter in adapters for name in adapter.hosts()}
    return {name: submodule(model, name) for name in names} | fused_above(model, names)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Register the adapter's parameters below the modules they belong to, as ``adapters.<name>``.

    Where tensor parallelism has parted a module, they are parted with it, by all processes.
    """
    adapter.values = values = alike(model, adapter.values)
    tie(values, adapter.plan)
    method, parameters = method_of(adapter.config), adapter.parameter_sites()
    adapter.reach = Reach() if method.invocation(adapter.config) else None
    if adapter.reach is not None:
        state_of(model).reaching = True
    shared = SharedPart(values.shared, method.shared_trained(adapter.config)) if values.shared else None

    def part_of(site: str, host: nn.Module) -> SiteAdapter:
        plan, own = adapter.plan.sites[site], values.sites[site]
        cut = bool(parted(host))
        made = method.part(
            adapter.config, plan, parted_values(host, own) if cut else own, strength=adapter.strength_at(site)
        )
        if cut:
            made.parted = True
        if adapter.reach is not None:
            made.reach = ReachAt(adapter.reach, site)
        if shared is not None:
            made.share(shared, hold=site == next(iter(values.sites)))
        return made

    for name in sorted(adapter.hosts()):  # in the same order in all processes, which may gather parts one by one
        module = submodule(model, name)
        part: nn.Module = Container()
        if name in values.sites:
            part = part_of(name, module)
        elif name in values.saved:
            part = bare_copy(module)
            part.load_state_dict(values.saved[name], assign=True)
        elif name in adapter.plan.tokens:
            part = TokenPart(adapter.plan.tokens[name], values.tokens.get(name))
        for leaf, site in parameters.get(name, {}).items():
            adapter.parts[site] = part_of(site, module)
            part.add_module(leaf, adapter.parts[site])
        adapter.parts[name] = part.train(module.training)
        if "adapters" not in module._modules:
            module.add_module("adapters", Container())
        submodule(module, "adapters").add_module(adapter.name, part)
    for name, own in adapter.plan.tokens.items():
        if own.tied:
            adapter.parts[name].share(adapter.parts[own.tied])  # type: ignore[operator]
    for name, first in adapter.plan.tied.items():
        if name in values.saved:
            adapter.parts[name].weight = adapter.parts[first].weight
    for path, tensor in values.tensors.items():
        owner, _, leaf = path.rpartition(".")
        if leaf == "bias":
            adapter.parts[owner].register_parameter(leaf, nn.Parameter(tensor))
        else:  # a weight in the place of the base's is as frozen as the base's
            adapter.parts[owner].register_buffer(leaf, tensor)


def detach(model: nn.Module, adapter: Adapter) -> None:
    """The inverse of :func:`attach`; the modules have to be rebound before they are called again."""
    adapter.values = adapter.current()
    adapter.parts, adapter.reach = {}, None
    for module in hosts(model, [adapter]).values():
        container = module._modules.get("adapters")
        if isinstance(container, Container):
            container.drop(adapter.name)
            if not container._modules:
                del module._modules["adapters"]


def rebind(model: nn.Module, touched: Mapping[str, nn.Module], running: list[Adapter]) -> None:
    """Give each touched module the forward of the running adapters, or its own where none is there.

    The forward finds them by their order, not by their names: see :meth:`Container.show`.
    """
    head = output_head(model)
    inner = {adapter.name: adapter.parameter_sites() for adapter in running}
    brings = {adapter.name: adapter.values.own() for adapter in running}
    adapted = {host for adapter in running for host in adapter.hosts()}
    for name, module in progress(touched.items(), "rewriting"):
        rewrites: list[Rewrite] = []
        parameters: dict[str, list[Rewrite]] = {}
        redirects: dict[str, tuple[str, Any]] = {}
        whole: str | None = None
        feed: Feed | None = None
        here = [adapter for adapter in running if name in adapter.parts]
        for number, adapter in enumerate(here):
            part, place = adapter.parts[name], active_name(number)
            if name in adapter.values.saved:
                whole = f"adapters.{place}"
            if isinstance(part, SiteAdapter):
                rewrite = method_of(adapter.config).rewrite(place, adapter.config, part)
                if isinstance(rewrite, Feed):
                    feed = rewrite
                else:
                    rewrites.append(rewrite)
            elif isinstance(part, TokenPart):
                rewrites.append(part.rewrite(place))
            for leaf, site in inner[adapter.name].get(name, {}).items():
                update: Any = method_of(adapter.config).rewrite(place, adapter.config, adapter.parts[site])  # type: ignore[arg-type]
                parameters.setdefault(leaf, []).append(update)
            for leaf in brings[adapter.name].get(name, {}):
                redirects[leaf] = (f"{place}.{leaf}", attribute(part, leaf))
        container = module._modules.get("adapters")
        if isinstance(container, Container):
            active = [adapter.parts[name] for adapter in here]
            for parts, runs in ((container.show(active), False), (active, True)):
                for held in (m for part in parts for m in part.modules() if isinstance(m, SiteAdapter)):
                    held.running = runs
        if whole:
            replace_module(module, whole)
        elif feed:
            feed_module(module, feed, name=name)
        elif parameters:
            if rewrites or redirects:
                raise AdapterError(f"{name}: {ONE_REWRITE}")
            read_module(module, parameters, name=name)
        elif rewrites or redirects:
            # losses that never call a head multiply by its weight
            rewrite_module(module, rewrites, name=name, redirects=redirects, alone=bool(rewrites) and module is head)
        else:
            unbind(module)
            if is_fused(module) and any(host.startswith(f"{name}." if name else "") for host in adapted):
                switch_off(module)


def check_together(adapters: list[Adapter]) -> None:
    """Refuse adapters that each bring their own copy of one module or parameter, and two that are active alone."""
    if len(adapters) < 2:
        return
    alone: dict[str, list[str]] = {}
    for adapter in adapters:
        alone.setdefault(method_of(adapter.config).alone, []).append(adapter.name)
    for what, names in alone.items():
        if what and len(names) > 1:
            raise AdapterError(f"only one {what} can be active at a time, found {', '.join(names)}")
    held: dict[tuple[str, str], str] = {}
    for adapter in adapters:
        for site, plan in adapter.plan.sites.items():
            other = held.setdefault((site, plan.alone), adapter.name) if plan.alone else adapter.name
            if other != adapter.name:
                raise AdapterError(f"{site}: only one {plan.alone} can be active, found {other} and {adapter.name}")
    check_apart(adapters)
    for attribute_name in ("saved", "tensors"):
        seen: dict[str, str] = {}
        clashes = []
        for adapter in adapters:
            for path in getattr(adapter.values, attribute_name):
                if path in seen:
                    clashes.append(f"{path}: {seen[path]} and {adapter.name}")
                seen[path] = adapter.name
        if clashes:
            raise AdapterError(
                "these adapters can't be active together, each brings its own\n"
                f"{listing(clashes)}\nset one of them active, or train them without modules_to_save and bias"
            )


def check_apart(adapters: list[Adapter]) -> None:
    """Refuse adapters that each bring rows of their own for one token."""
    clashes: list[str] = []
    for number, adapter in enumerate(adapters):
        for other in adapters[:number]:
            for name in adapter.plan.tokens.keys() & other.plan.tokens.keys():
                if both := {*adapter.plan.tokens[name].tokens} & {*other.plan.tokens[name].tokens}:
                    clashes.append(f"{name}: token {min(both)}: {other.name} and {adapter.name}")
    if clashes:
        raise AdapterError(
            f"these adapters can't be active together, each has its own row of a token\n{listing(sorted(clashes))}"
        )


def set_trainable(state: ModelState, names: Iterable[str] | None = None) -> None:
    """Active adapters that are not in inference mode are trained, or those that the user named; all others, and
    all while they are disabled, are frozen.

    Args:
        names: those for which that changed: others stay as they are, however many there are. Default: all.
    """
    for name in state.adapters if names is None else dict.fromkeys(names):
        adapter = state.adapters.get(name)
        if adapter is not None:
            state.note(adapter)
            usual = name in state.active and not adapter.config.inference_mode
            trains = usual if adapter.trained is None else adapter.trained
            for parameter in adapter.parameters():
                parameter.requires_grad_(trains and state.enabled)
