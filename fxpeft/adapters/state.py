"""What fxpeft keeps for one model: its adapters, which are active, and how they are bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.calls import unwatch_calls, watch_calls
from fxpeft.adapters.name import check_adapter_name
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import SiteAdapter, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.fast_path import fused_above, is_fused, switch_off
from fxpeft.model.wrappers import submodule
from fxpeft.model.wrappers import unwrap as unwrap
from fxpeft.passes.base import attribute, join
from fxpeft.passes.container import active_name
from fxpeft.passes.live import Container, bare_copy, feed_module, replace_module, rewrite_module, unbind
from fxpeft.passes.live.parameters import parameter_value, read_module
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.copies import Copies
from fxpeft.targets.parameters import ONE_REWRITE
from fxpeft.targets.sites import AdapterPlan, base_modules, base_state

if TYPE_CHECKING:
    from fxpeft.adapters.inplace import Folded
    from fxpeft.serving.swap import Serving

STATE = "_fxpeft"


@dataclass
class Values:
    """The tensors of an adapter, each at its place in the model.

    Args:
        sites: site -> parameter name -> tensor, in the shapes of the method.
        saved: module -> key of its ``state_dict`` -> the adapter's own copy (``modules_to_save``).
        tensors: dotted parameter name in the base -> the adapter's own value (``bias``, ``weight``).
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def own(self, site: str) -> dict[str, Tensor]:
        """Parameter name -> the adapter's own value of the base's parameters at a site."""
        return {p.rpartition(".")[2]: v for p, v in self.tensors.items() if p.rpartition(".")[0] == site}

    def clone(self, *, sites: bool = True) -> Values:
        """The same values in memory of their own, with or without those of the sites."""
        own = self.sites if sites else {}
        return Values(
            {site: {k: v.detach().clone() for k, v in parts.items()} for site, parts in own.items()},
            {path: {k: v.detach().clone() for k, v in parts.items()} for path, parts in self.saved.items()},
            {path: v.detach().clone() for path, v in self.tensors.items()},
        )


@dataclass
class Adapter:
    """One named set of a method's parameters.

    Args:
        values: the tensors. While the adapter is attached its modules hold the truth; see :meth:`current`.
        strength: factor on the adapter's own scale; see :func:`fxpeft.set_scale`.
        parts: while attached: host module's name -> what is registered there as ``adapters.<name>``; site of a
            parameter -> what is below that.
        lowered: on a prepared model: site -> slot values. prompt: there, the finished prompt of a prompt method.
        settled: whether the slot values are contiguous, so that showing them is a plain copy.
        copies: how to show the adapter alone in the slots, and the list of places where those were.
        trained: what :func:`fxpeft.set_requires_grad` said since the active adapters were last chosen.
    """

    name: str
    plan: AdapterPlan
    values: Values
    strength: float = 1.0
    parts: dict[str, nn.Module] = field(default_factory=dict)
    lowered: dict[str, SlotValues] = field(default_factory=dict)
    prompt: Tensor | None = None
    settled: bool = False
    copies: tuple[list[int], Copies] | None = field(default=None, compare=False)
    trained: bool | None = None

    def __post_init__(self) -> None:
        check_adapter_name(self.name)  # whatever entry it came in by

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": None}  # they lead into this model's slots, not into a copy's

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config, defaults filled in."""
        return self.plan.config

    def hosts(self) -> set[str]:
        """Names of the modules that the adapter touches."""
        sites = {self.plan.sites[site].kind.host(site) for site in self.values.sites}
        return {*sites, *self.values.saved, *map(_owner, self.values.tensors)}

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
        )

    @property
    def trains(self) -> bool:
        """Whether an optimiser would change it."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of an attached adapter."""
        for part in self.parts.values():
            yield from part.parameters()


@dataclass
class ModelState:
    """The adapters of one model. It names the base's modules and holds none: a copy of the model copies it.

    Args:
        folded: what is in the base's weights and can be taken out. baked: names of what is there for good.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    base_grads: dict[str, bool] = field(default_factory=dict)
    serving: Serving | None = None
    folded: Folded | None = None
    baked: list[str] = field(default_factory=list)

    def get(self, name: str) -> Adapter:
        """The adapter of that name, or an error that lists the names there are."""
        if name not in self.adapters:
            raise AdapterError(f"no adapter named {name!r}; loaded: {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def running(self) -> list[Adapter]:
        """The adapters that take part in the forward now."""
        return [self.adapters[name] for name in self.active] if self.enabled else []

    def check_unfolded(self, names: Iterable[str], what: str) -> None:
        """Refuse to do something to adapters that are in the base's weights."""
        inside = [*(self.folded.names if self.folded else ()), *self.baked]
        for name in names:
            if name in inside:
                todo = "it stays there (keep=None)" if name in self.baked else "unfold the model first"
                raise AdapterError(f"adapter {name!r} is folded into the base's weights, so {what}; {todo}")


def find_state(model: nn.Module) -> ModelState | None:
    """The model's state, or ``None`` for a bare model."""
    return vars(unwrap(model)).get(STATE)


def is_prepared(model: nn.Module) -> bool:
    """Whether the model's adapters are served from slots."""
    state = find_state(model)
    return state is not None and state.serving is not None


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


def ensure_state(model: nn.Module) -> ModelState:
    """The model's state, made where missing; then the base's parameters are frozen."""
    if STATE not in vars(model):
        state = ModelState()
        for name, parameter in _base_parameters(model):
            state.base_grads[name] = parameter.requires_grad
            parameter.requires_grad_(False)
        vars(model)[STATE] = state
        watch_calls(model)
    return vars(model)[STATE]  # type: ignore[no-any-return]


def drop_state(model: nn.Module) -> None:
    """Forget the state and give the base's parameters their ``requires_grad`` back."""
    state: ModelState = vars(model).pop(STATE)
    unwatch_calls(model)
    for name, parameter in _base_parameters(model):
        parameter.requires_grad_(state.base_grads.get(name, parameter.requires_grad))


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()  # a tied one counts once, under its first name
    for module_name, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield join(module_name, name), parameter


def hosts(model: nn.Module, adapters: Iterable[Adapter]) -> dict[str, nn.Module]:
    """Every module that the adapters touch, by name, and every one whose fast path would pass them by."""
    names = {name for adapter in adapters for name in adapter.hosts()}
    return {name: submodule(model, name) for name in names} | fused_above(model, names)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Register the adapter's parameters below the modules they belong to, as ``adapters.<name>``."""
    method, values = method_of(adapter.config), adapter.values
    parameters = adapter.parameter_sites()
    for name in adapter.hosts():
        module = submodule(model, name)
        part: nn.Module = Container()
        if name in values.sites:
            plan = adapter.plan.sites[name]
            part = method.part(adapter.config, plan, values.sites[name], strength=adapter.strength)
        elif name in values.saved:
            part = bare_copy(module)
            part.load_state_dict(values.saved[name], assign=True)
        for leaf, site in parameters.get(name, {}).items():
            plan = adapter.plan.sites[site]
            adapter.parts[site] = method.part(adapter.config, plan, values.sites[site], strength=adapter.strength)
            part.add_module(leaf, adapter.parts[site])
        adapter.parts[name] = part.train(module.training)
        if "adapters" not in module._modules:
            module.add_module("adapters", Container())
        submodule(module, "adapters").add_module(adapter.name, part)
    for path, tensor in values.tensors.items():
        owner, _, leaf = path.rpartition(".")
        if leaf == "bias":
            adapter.parts[owner].register_parameter(leaf, nn.Parameter(tensor))
        else:  # a weight in the place of the base's is as frozen as the base's
            adapter.parts[owner].register_buffer(leaf, tensor)


def detach(model: nn.Module, adapter: Adapter) -> None:
    """The inverse of :func:`attach`; the modules have to be rebound before they are called again."""
    adapter.values = adapter.current()
    adapter.parts = {}
    for module in hosts(model, [adapter]).values():
        container = module._modules.get("adapters")
        if isinstance(container, Container):
            container.drop(adapter.name)
            if not container._modules:
                del module._modules["adapters"]


def rebind(touched: Mapping[str, nn.Module], running: list[Adapter]) -> None:
    """Give each touched module the forward of the running adapters, or its own where none is there.

    The forward finds them by their order, not by their names: see :meth:`Container.show`.
    """
    inner = {adapter.name: adapter.parameter_sites() for adapter in running}
    adapted = {host for adapter in running for host in adapter.hosts()}
    for name, module in touched.items():
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
            for leaf, site in inner[adapter.name].get(name, {}).items():
                update: Any = method_of(adapter.config).rewrite(place, adapter.config, adapter.parts[site])  # type: ignore[arg-type]
                parameters.setdefault(leaf, []).append(update)
            for path in adapter.values.tensors:
                owner, _, leaf = path.rpartition(".")
                if owner == name:
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
            rewrite_module(module, rewrites, name=name, redirects=redirects)
        else:
            unbind(module)
            if is_fused(module) and any(host.startswith(f"{name}." if name else "") for host in adapted):
                switch_off(module)


def check_together(adapters: list[Adapter]) -> None:
    """Refuse adapters that each bring their own copy of one module or parameter, and two prompts."""
    prompts = [a.name for a in adapters if method_of(a.config).whole]
    if len(prompts) > 1:
        raise AdapterError(f"only one prompt can be active at a time, found {', '.join(prompts)}")
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


def set_trainable(state: ModelState, names: Iterable[str] | None = None) -> None:
    """Active adapters that are not in inference mode are trained, or those that the user named; all others, and
    all while they are disabled, are frozen.

    Args:
        names: those for which that changed: others stay as they are, however many there are. Default: all.
    """
    for name in state.adapters if names is None else dict.fromkeys(names):
        adapter = state.adapters.get(name)
        if adapter is not None:
            usual = name in state.active and not adapter.config.inference_mode
            trains = usual if adapter.trained is None else adapter.trained
            for parameter in adapter.parameters():
                parameter.requires_grad_(trains and state.enabled)


def placement(module: nn.Module, model: nn.Module, autocast: bool, leaf: str = "") -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a new adapter's parameters at a module, or at its parameter ``leaf``.

    Half precision becomes float32 with ``autocast``, as in PEFT; quantised weights count as half.
    """
    hook_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weight = parameter_value(module, leaf) if leaf else next(iter(module.parameters(recurse=False)), None)
    device = weight.device if weight is not None else next(model.parameters()).device
    if hook_device is not None and device.type == "meta":
        device = torch.device(hook_device)
    dtype = weight.dtype if weight is not None else torch.float32
    if autocast and (dtype in (torch.float16, torch.bfloat16) or not dtype.is_floating_point):
        dtype = torch.float32
    return device, dtype if dtype.is_floating_point else torch.float32


def home(tensor: Tensor, module: nn.Module) -> torch.device:
    """Where an adapter's own copy of a module's tensor lives: beside it, or where accelerate runs the module."""
    if not tensor.is_meta:
        return tensor.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def _owner(path: str) -> str:
    return path.rpartition(".")[0]
