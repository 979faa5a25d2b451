"""The tensors of a checkpoint to their places in a model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxpeft.checkpoint.keys import apart
from fxpeft.checkpoint.reading import Checkpoint, minor_of
from fxpeft.checkpoint.stacks import from_old, has_old
from fxpeft.errors import CheckpointError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import Base, Method
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.model.walk import base_state, base_values, embedding_layer, full_tensor
from fxpeft.model.wrappers import submodule
from fxpeft.outside import why_unfit
from fxpeft.passes.base import PassError, attribute, join
from fxpeft.passes.targets.operations import ParameterKind
from fxpeft.passes.targets.operations.registry import kinds
from fxpeft.targets.sites import AdapterPlan


@dataclass
class Misfit:
    """What of a checkpoint doesn't fit a model, for a caller who goes on without it.

    Args:
        missing: places that got no tensor. unexpected: keys that have no place.
        mismatched: key, shape in the file, shape in the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


def assign(
    model: nn.Module | Modules,
    plan: AdapterPlan,
    found: Checkpoint,
    *,
    check_finite: bool = False,
    misfit: Misfit | None = None,
    declared: Collection[str] = (),
    partial: bool = False,
    shapes_only: bool = False,
) -> Values:
    """Find the place of every tensor of a checkpoint whose names are the model's.

    Args:
        found: see :func:`fxpeft.checkpoint.layouts.in_layout_of`.
        declared: modules that an adapter may bring whole: a base weight in the file becomes one of these.
        partial: the model is a part of what the checkpoint is for: tensors of modules that it lacks are left out.
        misfit: is told what is missing, unexpected or of another shape, which is then no error: the
            values lack those places.
        shapes_only: what is found is on the meta device, and nothing is worked out of the base's weights, which may
            be there too.

    Raises:
        CheckpointError: keys that have no place, places that got no tensor, wrong shapes, NaN or
            infinity with ``check_finite``; all of them are named.
    """
    modules, method, config = Modules.of(model), method_of(plan.config), plan.config
    if partial and method.ordered:
        raise CheckpointError(
            f"{found.source}: partial=True: what a site of {method.name} has follows from its place among all sites of "
            "the whole model"
        )
    model = modules.model
    shared, kept = apart(found.tensors, method.shared_keys)
    kept = {key: tensor for key, tensor in kept.items() if ".original_module." not in key}
    left = {_short(key, method.prefix): tensor for key, tensor in kept.items()}
    left |= _stored_shared(shared, method, config, found.source)
    values = Values()
    missing: list[str] = []
    wrong: list[str] = []
    _turn_stacks(plan, left, found.release)

    def take(key: str, shape: torch.Size | tuple[int, ...], own: torch.dtype | None = None) -> Tensor | None:
        tensor = left.pop(key, None)
        if tensor is None:
            missing.append(f"{key} {list(shape)}" if misfit is None else key)
        elif tuple(tensor.shape) != tuple(shape) and misfit is not None:
            misfit.mismatched.append((key, tuple(tensor.shape), tuple(shape)))
            return None
        elif tuple(tensor.shape) != tuple(shape):
            wrong.append(f"{key}: expected {list(shape)}, found {list(tensor.shape)}{_cure(model, shape, tensor)}")
        elif (why := why_unfit(tensor, own)) is not None:
            wrong.append(f"{key}: {why}")
        elif check_finite and not torch.isfinite(tensor).all():
            wrong.append(f"{key}: expected finite values, found NaN or infinity")
        return tensor

    for site, site_plan in plan.sites.items():
        shapes = method.stored_shapes(config, site_plan)
        keys = {n: _short(method.key(site, site_plan, n), method.prefix) for n in shapes}
        taken = {n: take(keys[n], s, method.dtype(n)) for n, s in shapes.items()}
        found_here = {n: t for n, t in taken.items() if t is not None}
        values.sites[site] = method.taken(config, site_plan, _of_one_dtype(found_here))
        fits = {n: tuple(t.shape) for n, t in found_here.items()} == shapes
        if fits and (why := method.why_unfit(config, site_plan, values.sites[site])):
            wrong.append(f"{site}: {why}")
    for name, shape in method.shared(config, plan.sites).items():
        if name in method.shared_stored(config) and (tensor := take(method.shared_keys[name], shape)) is not None:
            values.shared[name] = tensor
    for name, rows in plan.tokens.items():
        key = f"{name}.{method.tokens_key}"
        if rows.tied:
            left.pop(key, None)  # PEFT's TRAINABLE_TOKENS writes the embeddings' rows a second time
        elif (tensor := take(key, rows.shape)) is not None:
            values.tokens[name] = tensor
    for path in plan.saved:
        own = base_state(submodule(model, path))
        taken = {k: take(f"{path}.{k}", v.shape, v.dtype) for k, v in own.items()}
        values.saved[path] = {k: t for k, t in taken.items() if t is not None}
    unsaved = _unsaved_biases(model, plan, left, found) if misfit is None else {}
    values.tensors.update(unsaved)
    for path in plan.tensors:
        if path in unsaved:
            continue
        owner, _, leaf = path.rpartition(".")
        wrapped = f"{owner}.base_layer.{leaf}"
        tensor = take(wrapped if wrapped in left else path, attribute(model, path).shape)
        if tensor is not None:
            values.tensors[path] = tensor
    _base_weights(modules, plan, left, values, wrong, misfit)
    _leave_out(plan, left, found.source)
    if partial:
        _leave_absent(modules, method, left, found.source)
    _into_declared(model, values, declared)
    if misfit is not None:
        misfit.missing, misfit.unexpected = missing, list(left)
        missing, left = [], {}
    if missing or wrong or left:
        parts = [
            f"{title}\n{listing(items)}"
            for title, items in (
                ("places in the model that the file doesn't fill:", missing),
                ("tensors that don't fit:", wrong),
                ("keys that have no place in the model:", [f"{k} {list(t.shape)}" for k, t in left.items()]),
            )
            if items
        ]
        raise CheckpointError(
            f"{found.source} doesn't fit {type(model).__name__} with its own config; nothing was changed.\n"
            + "\n".join(parts)
            + "\nIs it an adapter of another base model, or are target_modules or rank_pattern in its config wrong?"
            + (_PARTIAL if left and not (partial or missing or wrong) else "")
        )
    _restore(model, plan, values, found.source, shapes_only=shapes_only)
    return values.each(lambda tensor: tensor.to("meta")) if shapes_only else values


def _of_one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A site's numbers in the widest dtype that a file has there, since one product is made of all of them."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) < 2:
        return tensors
    wide = functools.reduce(torch.promote_types, floating)
    return {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _turn_stacks(plan: AdapterPlan, left: dict[str, Tensor], release: str | None) -> None:
    """Give stacks of experts the layout that they have since PEFT 0.19."""
    method = method_of(plan.config)
    for site, own in plan.sites.items():
        if not isinstance(own.kind, ParameterKind):
            continue
        keys = [_short(method.key(site, own, name), method.prefix) for name in ("lora_A", "lora_B")]
        if not set(keys) <= left.keys():
            continue
        a, b = (left[key] for key in keys)
        if has_old(own.kind, own.rank, a, b, release):
            left.update(zip(keys, from_old(own.kind, a, b), strict=True))


def _unsaved_biases(
    model: nn.Module, plan: AdapterPlan, left: Mapping[str, Tensor], found: Checkpoint
) -> dict[str, Tensor]:
    """The base's own biases, where PEFT before 0.21 left out those of ``bias="lora_only"`` when it saved."""
    if getattr(plan.config, "bias", "none") != "lora_only" or (minor_of(found.release) or 0) >= 21:
        return {}
    own = {path: attribute(model, path).detach() for path in plan.tensors}
    if not own or any(key.endswith("bias") for key in left) or any(bias.is_meta for bias in own.values()):
        return {}
    warnings.warn(
        f"{found.source}: bias='lora_only', but no bias is in the file: PEFT before 0.21 saved none. The base's own "
        "are taken, as in PEFT; the outputs are not those of the trained adapter",
        stacklevel=5,
    )
    return {path: bias.clone() for path, bias in own.items()}


def _stored_shared(
    shared: dict[str, Tensor], method: Method[Any], config: AdapterConfig, source: str
) -> dict[str, Tensor]:
    """What all sites share in a file; what the config says is in none is left out, as in PEFT, and told of."""
    stored = {method.shared_keys[name] for name in method.shared_stored(config)}
    if unread := [key for key in shared if key not in stored]:
        warnings.warn(
            f"{source}: {', '.join(unread)} are left out: its config says that they follow from the config",
            stacklevel=5,
        )  # fmt: skip
    return {key: tensor for key, tensor in shared.items() if key in stored}


def _leave_out(plan: AdapterPlan, left: dict[str, Tensor], source: str) -> None:
    """Drop the tensors of modules that the plan leaves out, and say so."""
    dropped: dict[str, int] = {}
    for key in list(left):
        site = next((name for name in plan.left_out if key.startswith(f"{name}.")), None)
        if site is not None:
            del left[key]
            dropped[site] = dropped.get(site, 0) + 1
    if dropped:
        lines = [f"{site}: {count} tensors; {plan.left_out[site]}" for site, count in dropped.items()]
        warnings.warn(f"{source}: tensors of these modules are left out\n{listing(lines)}", stacklevel=4)


_PARTIAL = (
    " Where the model is a part of it, such as a pipeline's stage: partial=True leaves out what modules it lacks had"
)


def _leave_absent(modules: Modules, method: Method[Any], left: dict[str, Tensor], source: str) -> None:
    """Drop the tensors of modules that the model lacks, and say which; what no place of a module is stays."""
    suffixes = sorted(
        {f".{suffix}" for kind in kinds() for suffix in method.keys(kind).values()}, key=len, reverse=True
    )
    absent: dict[str, int] = {}
    for key in list(left):
        suffix = next((s for s in suffixes if key.endswith(s)), f".{key.rpartition('.')[2]}")
        owner = above = key.removesuffix(suffix).removesuffix(".base_layer")
        while above and above not in modules:
            above = above.rpartition(".")[0]
        if owner != above and not modules.is_leaf(above):  # below a leaf there is nothing that could be absent
            del left[key]
            absent[owner] = absent.get(owner, 0) + 1
    if absent:
        lines = [f"{owner}: {count} tensors" for owner, count in absent.items()]
        warnings.warn(f"{source}: partial=True: the model has none of these modules\n{listing(lines)}", stacklevel=5)


def _restore(model: nn.Module, plan: AdapterPlan, values: Values, source: str, *, shapes_only: bool) -> None:
    """Work out what no file holds, from the base's weights."""
    method, config = method_of(plan.config), plan.config
    stored = method.shared_stored(config)
    shared = {n: torch.empty(s) for n, s in method.shared(config, plan.sites).items() if n not in stored}
    if shared:
        method.initialise_shared(config, shared)
        values.shared |= shared
    if not plan.weights and not method.frozen(config):
        return
    for path in plan.weights:
        values.tensors[path] = attribute(model, path).detach().clone()
    brings = values.own()
    for site, site_plan in plan.sites.items():
        base = Base(submodule(model, site), brings.get(site, {}), shared=values.shared)
        shapes = {n: s for n, s in method.shapes(config, site_plan).items() if n in method.frozen(config)}
        device = attribute(base.module, "weight").device if shapes else None
        values.sites[site] |= {n: torch.empty(s, device=device, dtype=method.dtype(n)) for n, s in shapes.items()}
        if shapes_only:
            continue
        try:
            method.restore(config, site_plan, values.sites[site], base)
        except PassError as error:
            raise CheckpointError(
                f"{source}: {site}: it starts from the base's weight, which can't be decomposed here: {error}"
            ) from None


def _into_declared(model: nn.Module, values: Values, declared: Collection[str]) -> None:
    """Give a base weight in the file the place of its module, where that may be brought."""
    for module in declared:
        brought = [path for path in values.tensors if path.startswith(f"{module}.")]
        if brought and module not in values.saved:
            own = {k: v.detach() for k, v in base_values(submodule(model, module)).items()}
            values.saved[module] = own | {p[len(module) + 1 :]: values.tensors.pop(p) for p in brought}


def _base_weights(
    modules: Modules,
    plan: AdapterPlan,
    left: dict[str, Tensor],
    values: Values,
    wrong: list[str],
    misfit: Misfit | None,
) -> None:
    """Base weights in the file: PEFT saves embeddings too where they are targets or were resized.

    Equal to the model's they need nothing; otherwise the adapter brings its own, as PEFT's would.
    """
    brought: list[str] = []
    for key in list(left):
        path = key.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        if path.rpartition(".")[2] not in ("weight", "bias"):
            continue
        try:
            own = attribute(modules.model, path)
        except AttributeError:
            continue
        if not isinstance(own, Tensor):
            continue
        tensor = left.pop(key)
        if own.shape != tensor.shape and misfit is not None:
            misfit.mismatched.append((key, tuple(tensor.shape), tuple(own.shape)))
        elif own.shape != tensor.shape:
            cure = _cure(modules.model, own.shape, tensor)
            wrong.append(f"{key}: expected {list(own.shape)}, found {list(tensor.shape)}{cure}")
        elif (why := why_unfit(tensor, own.dtype)) is not None:
            wrong.append(f"{key}: {why}")
        elif not own.is_meta and not _same(full_tensor(own.detach()).cpu(), tensor):
            values.tensors[path] = tensor
            brought.append(path)
    for path in brought:  # one parameter under several names, of which PEFT writes into all at once
        for other in _tied(modules, path):
            if other not in plan.tensors and not any(other.startswith(f"{saved}.") for saved in plan.saved):
                values.tensors.setdefault(other, values.tensors[path])


def _same(own: Tensor, tensor: Tensor) -> bool:
    """Whether one of two is the other, perhaps rounded to a narrower dtype."""
    return torch.equal(own, tensor.to(own.dtype)) or torch.equal(own.to(tensor.dtype), tensor)


def _tied(modules: Modules, path: str) -> list[str]:
    """The other names of a base's parameter."""
    own = attribute(modules.model, path)
    places = ((join(site, leaf), p) for site, module in modules.items() for leaf, p in module._parameters.items())
    return [name for name, parameter in places if parameter is own and name != path]


def _cure(model: nn.Module, own: torch.Size | tuple[int, ...], tensor: Tensor) -> str:
    """What to do where a tensor has a row for each token of another vocabulary."""
    embeddings = embedding_layer(model, "input") if isinstance(model, PreTrainedModel) else None
    weight = getattr(embeddings, "weight", None)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else None
    if not own or not tensor.ndim or own[0] != rows or tuple(own[1:]) != tuple(tensor.shape[1:]):
        return ""
    return f"; if the vocabulary was resized in training, call model.resize_token_embeddings({tensor.shape[0]}) first"


def _short(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).replace(".modules_to_save.", ".")
