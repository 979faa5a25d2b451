"""Trace a whole model without its weights: a copy with fake tensors, exported once, shows the data flow."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError
from fxpeft.model.repeats import Repeats
from fxpeft.model.wrappers import named_modules, unwrap
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live import Container, base_class, unbind
from fxpeft.passes.source import check_path
from fxpeft.passes.targets.flow import Flow, flow_of, same_inputs
from fxpeft.passes.targets.match import module_kind
from fxpeft.passes.targets.roles import roles_of_sites
from fxpeft.passes.torch_private import FakeTensorMode, pytree
from fxpeft.passes.tried import warn_untried

warn_untried("transformers", transformers.__version__)  # every other module of this package comes after this one
T = TypeVar("T")
BATCH, LENGTH = 2, 6
_tracing = threading.RLock()  # torch.export keeps what it is at in variables of the process
_flows: WeakKeyDictionary[nn.Module, tuple[list[Any], Flow]] = WeakKeyDictionary()
_shorts: WeakKeyDictionary[nn.Module, tuple[list[Any], list[tuple[Repeats, Flow]]]] = WeakKeyDictionary()
_LEFT_OUT = nn.Identity()


@contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time captures a model."""
    with _tracing:
        yield


def _free_after_fork() -> None:
    global _tracing
    _tracing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_after_fork)


def skeleton(model: nn.Module, mode: FakeTensorMode, without: Collection[nn.Module] = ()) -> nn.Module:
    """A copy of the base model with fake tensors on one device: no weight is read, no adapter and no hook is in it.

    Args:
        without: modules to leave out of the lists that hold them, which are numbered anew.
    """
    memo: dict[int, Any] = {id(part): _LEFT_OUT for part in without}
    gone = {id(part) for each in without for part in each.modules()}
    for part in model.modules():
        if id(part) in gone:
            continue  # a tensor without data for each of many experts takes longer than the trace
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _fake(tensor, mode)
        for child in part._modules.values():
            if isinstance(child, Container):
                memo[id(child)] = Container()
        if "_fxpeft" in vars(part):
            memo[id(vars(part)["_fxpeft"])] = None  # adapters and slots: not the base's
    copied = unwrap(copy.deepcopy(model, memo))
    for part in list(copied.modules()):
        for name, child in part._modules.items():
            part._modules[name] = None if child is None else unwrap(child)
    for part in list(copied.modules()):
        unbind(part)
        if _LEFT_OUT in part._modules.values():
            stay = [child for child in part._modules.values() if child is not _LEFT_OUT]
            part._modules = {str(number): child for number, child in enumerate(stay)}
        for name, child in list(part._modules.items()):
            if isinstance(child, Container):
                del part._modules[name]
            elif child is not None and _is_packed(child):
                bias = getattr(child, "bias", None) is not None
                with mode:
                    part._modules[name] = nn.Linear(child.in_features, child.out_features, bias)  # type: ignore[arg-type]
        for name in [n for n in vars(part) if n in ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")]:
            del vars(part)[name]
        for name in [n for n in vars(part) if n.endswith("_hooks") and isinstance(vars(part)[n], OrderedDict)]:
            vars(part)[name] = OrderedDict()
    return copied.eval()


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _is_packed(module: nn.Module) -> bool:
    """A linear whose weight is no [out, in] matrix of floats: a quantised one."""
    kind, weight = module_kind(module), getattr(module, "weight", None)
    if kind is None or not kind.is_linear or (isinstance(module, nn.Linear) and type(weight) is nn.Parameter):
        return False
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        return True
    return tuple(weight.shape) != (kind.out_features, kind.in_features)


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Inputs that a Transformers model takes, by its signature; the ``dummy_inputs`` of any other one."""
    if not isinstance(model, PreTrainedModel):
        own = getattr(model, "dummy_inputs", None)
        return own if isinstance(own, dict) else None
    names, config = inspect.signature(model.forward).parameters, model.config
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    found: dict[str, Any] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in names:
            found[name] = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None)
    if "pixel_values" in names and size is not None:
        shape = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        found["pixel_values"] = torch.zeros(BATCH, channels, *shape, dtype=dtype, device="meta")
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if "input_features" in names and bins and frames:
        found["input_features"] = torch.zeros(BATCH, bins, 2 * frames, dtype=dtype, device="meta")
    if "input_values" in names:
        found["input_values"] = torch.zeros(BATCH, 4000, dtype=dtype, device="meta")
    if not found and isinstance(model.dummy_inputs, dict):
        return dict(model.dummy_inputs)
    if "use_cache" in names:
        found["use_cache"] = False
    return found


def trace_model(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, without: Collection[nn.Module] = ()
) -> GraphModule:
    """The graph of a whole model, from ``torch.export`` on its :func:`skeleton`.

    Args:
        inputs: keyword arguments of ``forward``; only shapes and dtypes of tensors matter. Default:
            :func:`example_inputs`.
        without: modules to leave out, as in :func:`skeleton`.

    Raises:
        AdapterError: no inputs are known, or the model can't be exported.
    """
    check_module_names(model)
    given = example_inputs(model) if inputs is None else dict(inputs)
    if not given:
        raise AdapterError(
            f"{type(model).__name__} doesn't say what its inputs are, so that it can't be traced; pass inputs={{...}} "
            "to fxpeft.roles or fxpeft.plan, or give the model a dict `dummy_inputs`"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    bare = skeleton(model, mode, without)
    if isinstance(bare, PreTrainedModel):
        _choose_traceable(bare)
    # a model for several kinds of input may take them all only with values that fit; its first is worth a try
    first = getattr(model, "main_input_name", None)
    tries = [given]
    # but not without layers: it has to run as the whole one does
    if inputs is None and not without and first in given and sum(isinstance(v, Tensor) for v in given.values()) > 1:
        tries.append({k: v for k, v in given.items() if k == first or not isinstance(v, Tensor)})
    failure: Exception | None = None
    for attempt in tries:
        moved = pytree.tree_map(lambda v: _fake(v, mode) if isinstance(v, Tensor) else v, attempt)
        try:
            with tracing(), torch.no_grad(), warnings.catch_warnings(), _quiet("torch._subclasses.fake_tensor"):
                warnings.simplefilter("ignore")
                program = torch.export.export(bare, (), moved, strict=False)
                return program.module(check_guards=False)
        except Exception as error:  # noqa: BLE001 - whatever a forward raises on fake tensors: it can't be traced
            failure = failure or error
    lines = str(failure).strip().splitlines() or [""]
    raise AdapterError(
        f"torch.export can't trace {type(model).__name__}: {type(failure).__name__}: {lines[0]}\npass inputs={{...}} "
        "to fxpeft.roles or fxpeft.plan, or name targets by name:, kind:, class:, layers[] instead of role:"
    ) from failure


def check_module_names(model: nn.Module) -> None:
    """Refuse a model that can't be captured, since a module's or tensor's name would become code.

    Raises:
        AdapterError: the name, and what is wrong with it.
    """
    try:
        for name, module in named_modules(model):
            for leaf in ("", *module._parameters, *module._buffers):
                check_path(join(name, leaf))
    except PassError as error:
        raise AdapterError(f"{base_class(model).__name__} can't be captured: {error}") from None


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keep a logger's tracebacks to itself: what fails is told in the error."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        found.setLevel(level)


def _choose_traceable(bare: PreTrainedModel) -> None:
    """Let attention run as plain operations: a role doesn't depend on the kernel that serves it."""
    for part in bare.modules():  # a model of several parts has a config for each
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False  # type: ignore[union-attr]
    if getattr(bare.config, "_attn_implementation", "eager") in ("sdpa", "eager"):
        return
    try:
        bare.set_attn_implementation("sdpa")
    except ValueError:
        bare.set_attn_implementation("eager")


def model_flow(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Flow:
    """The data flow of a whole model, its sites named as ``named_modules`` names them first.

    Kept for as long as the model lives and its modules stay the same: tracing takes seconds. To be read only.
    """
    if inputs is not None:
        return _flow(unwrap(model), inputs)
    model, own = unwrap(model), _outline(model)
    with tracing():
        if model not in _flows or _flows[model][0] != own:
            _flows[model] = (own, _flow(model, None))
        return _flows[model][1]


def _outline(model: nn.Module) -> list[Any]:
    """What a trace of a model is kept by."""
    return [
        (name, base_class(m), *(t.shape for t in m._parameters.values() if t is not None))
        for name, m in named_modules(model)
    ]


def _flow(model: nn.Module, inputs: Mapping[str, Any] | None, repeats: Repeats | None = None) -> Flow:
    flow = flow_of(trace_model(model, inputs, () if repeats is None else repeats.dropped))
    modules = list(named_modules(model, remove_duplicate=False))
    first = {module: name for name, module in reversed(modules)}
    names = {name: first[module] for name, module in modules}
    for _, attributes in flow.nodes(data=True):
        site = attributes["site"] if repeats is None else repeats.name(attributes["site"])
        attributes["site"] = names.get(site, site)
    return flow


def _short_flows(model: nn.Module, inputs: Mapping[str, Any] | None) -> Iterator[tuple[Repeats, Flow]]:
    """The data flow of a model with a few layers of each kind; a model may not run without some of them.

    Kept as :func:`model_flow` is.
    """
    own = _outline(model)
    found = _shorts[model][1] if inputs is None and model in _shorts and _shorts[model][0] == own else None
    if found is not None:
        yield from found
        return
    found = []
    for nested in (True, False):
        repeats = Repeats.of(model, nested=nested)
        if not repeats.dropped or (found and len(found[0][0].lists) == len(repeats.lists)):
            continue
        with contextlib.suppress(AdapterError):
            found.append((repeats, _flow(model, inputs, repeats)))
            if inputs is None:
                _shorts[model] = (own, found)
            yield found[-1]


def roles(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, tuple[str, ...]]:
    """What each module does in the model's data flow: dotted name -> roles.

    The model is traced once with fake tensors, of layers that are alike a few; no weight is read and nothing is
    changed. See :data:`fxpeft.passes.targets.roles.ROLES` for the roles and
    :class:`fxpeft.passes.targets.roles.Role` for your own.

    Args:
        inputs: keyword arguments of ``forward``, as in :func:`trace_model`.

    Raises:
        AdapterError: the model can't be traced.
    """
    model = unwrap(model)
    return _by_module(model, inputs, roles_of_sites)


def first_readers(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Module that applies a weight -> the first one that reads the same value; otherwise as :func:`roles`."""

    def relative(flow: Flow) -> dict[str, tuple[int, str]]:
        return {site: _way(site, first) for site, first in same_inputs(flow).items()}

    found = _by_module(unwrap(model), inputs, relative)
    return {site: join(*site.split(".")[: len(site.split(".")) - up], rest) for site, (up, rest) in found.items()}


def _way(start: str, end: str) -> tuple[int, str]:
    """From one module's name to another's: how many parts to leave out at the end, and what comes in their place."""
    parts, others = start.split("."), end.split(".")
    pairs = zip(parts, others, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(parts), len(others)))
    return len(parts) - same, ".".join(others[same:])


def _by_module(
    model: nn.Module, inputs: Mapping[str, Any] | None, find: Callable[[Flow], dict[str, T]]
) -> dict[str, T]:
    """What is found by a module's name in a model's data flow, in the modules' order."""
    with tracing():
        for repeats, flow in _short_flows(model, inputs):
            found = repeats.expand(find(flow))
            if found is not None:
                order = {name: at for at, (name, _) in enumerate(named_modules(model))}
                return dict(sorted(found.items(), key=lambda item: order.get(item[0], -1)))
        return find(model_flow(model, inputs))
