"""A packaged model: one compiled ``.pt2`` with slots in it, made here and opened in :mod:`fxpeft.programs.packaged`."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxpeft.adapters.invocation import cache_in
from fxpeft.adapters.state import find_state
from fxpeft.errors import AdapterError, listing
from fxpeft.files import make_folder, replacing
from fxpeft.methods import following
from fxpeft.methods.alora import Alora
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.fingerprint import fingerprint
from fxpeft.model.placement import placement
from fxpeft.model.skeleton import kind_to_json
from fxpeft.model.trace import check_module_names, tracing
from fxpeft.model.walk import base_modules
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.base import PassError
from fxpeft.passes.live import base_weight, kind_of
from fxpeft.passes.meta import LIFTED
from fxpeft.passes.slots.slot import CARRIER
from fxpeft.passes.torch_private import aot_compile, is_freezing, load_package, package_files, pytree
from fxpeft.programs.exported import USER
from fxpeft.programs.inputs import describe, without_gaps
from fxpeft.programs.reach import tokens_of
from fxpeft.programs.rewrites import Slots
from fxpeft.programs.rewriting import rewrite
from fxpeft.serving.declared import check_slots
from fxpeft.targets.sites import find_sites, make_plan

MANIFEST = "fxpeft.json"
WEIGHTS = (
    "fxpeft/weights.safetensors"  # in the archive, below its root: the sites' weights and biases, for DoRA and HRA
)
VERSION = 1


def package(
    model: nn.Module,
    path: str | Path,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    max_rank: int = 64,
    targets: str | Collection[str] | AdapterConfig | None = None,
    methods: Sequence[str] = ("lora",),
    rank: Literal["dynamic", "static"] = "dynamic",
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Export a bare model, give its targets slots, compile it with AOTInductor and write one ``.pt2``.

    :func:`fxpeft.open_package` runs it and swaps adapters in it, without the model's code.

    Args:
        path: ends in ``.pt2``; written beside it first, then renamed.
        example_inputs: positional or keyword arguments of a forward: tensors with the devices, dtypes and order in
            memory (such as ``channels_last``) to come, and flags with the only values to come.
        targets: as in :func:`fxpeft.prepare_hotswap`, or a config whose targets are taken.
        methods: any of those of ``prepare_hotswap`` but prompts. With ``alora`` there has to be one input of tokens, or
            one named ``input_ids``. With ``dora`` or ``hra``, which are computed from the
            base's weights, the file holds those of the sites twice: compiled, and to be read.
        rank: ``"dynamic"``: a step pays for the rank in use; ``"static"``: for ``max_rank``.
        dynamic_shapes: as in ``torch.export.export``.
        options: Inductor's, as in ``torch._inductor.aoti_compile_and_package``.

    Raises:
        AdapterError: the model has adapters, or something is declared that can't be packaged.
    """
    model, path = unwrap(model), Path(path)
    check_slots(methods, max_rank, rank, at_targets=True)
    if path.suffix != ".pt2":
        raise AdapterError(f"path: expected a name that ends in .pt2, found {path}")
    if find_state(model) is not None:
        raise AdapterError("the model has adapters: package the bare model (fxpeft.remove), then load them into it")
    if model.training:
        raise AdapterError("the model is in training mode, and a package serves: call model.eval() first")
    if is_freezing() or (options or {}).get("freezing"):
        raise AdapterError("Inductor's freezing folds slots into constants, so swaps would have no effect")
    sites = _sites(model, targets)
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    args, kwargs = without_gaps((args, kwargs))
    with torch.no_grad():
        check_module_names(model)
        with tracing():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        symbols = _symbols(program)
        slotted = rewrite(program, Slots(pattern_of(sites), max_rank, tuple(methods), rank))
        symbols += [symbol for symbol in _symbols(slotted) if symbol.ranks is not None]
        content = manifest(model, sites, max_rank, methods, rank)
        content |= {**describe(program), "outputs": _outputs(program)}
        if Alora.name in methods:
            content |= {"tokens": tokens_of(program, program.graph_module).name, "cached": _cached(args, kwargs)}
        weights = _weights(model, sites) if following() & {*methods} else {}
        _write(path, slotted, content, weights, symbols, dict(options or {}))
    return path


def _cached(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache, so that its tokens alone don't say where an invocation was."""
    return cache_in([*args, *kwargs.values()]) is not None


def _sites(model: nn.Module, targets: str | Collection[str] | AdapterConfig | None) -> list[str]:
    if isinstance(targets, AdapterConfig):
        if wanted := getattr(targets, "target_parameters", None):
            raise AdapterError(
                f"target_parameters={wanted!r}: a package has slots at modules only; leave them out of targets, and "
                "fold adapters of parameters into the model before packaging it"
            )
        return list(make_plan(model, targets).sites)
    return list(find_sites(model, "all-linear" if targets is None else targets).kinds)


def manifest(
    model: nn.Module, sites: Collection[str], max_rank: int, methods: Sequence[str], rank: str
) -> dict[str, Any]:
    """What a package says of itself: enough to plan and check any adapter without the model.

    ``modules`` has every module that could be a target, so that a target that has no slot is noticed.
    """
    modules = {}
    for name, module in base_modules(model):
        try:
            kind = kind_of(module)
        except PassError:
            continue
        if name:
            dtype = placement(module, model, autocast=False)[1]
            bias = isinstance(getattr(module, "bias", None), Tensor)
            modules[name] = {**kind_to_json(kind), "dtype": str(dtype).removeprefix("torch."), "bias": bias}
    return {
        "version": VERSION,
        "model": type(model).__name__,
        "fingerprint": fingerprint(model),
        "max_rank": max_rank,
        "methods": list(methods),
        "rank": rank,
        "device": str(next(model.parameters()).device),
        "sites": list(sites),
        "modules": modules,
    }


def pattern_of(sites: Collection[str]) -> str:
    """A regular expression for exactly these names: a list would take names that end in one of them too."""
    return "|".join(re.escape(site) for site in sites)


def _weights(model: nn.Module, sites: Collection[str]) -> dict[str, Tensor]:
    """What the sites' gains are computed from: each weight, ``[out, in, ...]``, and bias."""
    tensors = {}
    for site in sites:
        module = submodule(model, site)
        try:
            tensors[f"{site}.weight"] = base_weight(module).cpu().clone(memory_format=torch.contiguous_format)
        except PassError as error:
            raise AdapterError(
                f"{site}: it can't serve {', '.join(sorted(following()))}, which need its weight: {error}"
            ) from None
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            tensors[f"{site}.bias"] = bias.detach().cpu().clone()
    return tensors


@dataclass(frozen=True)
class _Symbol:
    """A symbolic size of an input as it was before compiling, with the guards that there were on any size then."""

    place: str
    size: torch.SymInt
    expression: Any
    guards: int
    ranks: range | None


def _symbols(program: ExportedProgram) -> list[_Symbol]:
    """What has to stay symbolic; ``ranks``: the sizes that the active rank's carrier can have."""
    found = []
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is USER}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names or not isinstance(node.meta.get("val"), Tensor):
            continue
        carrier = (LIFTED.get(node) or "").endswith(CARRIER)
        for dimension, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            expression, ranks = size.node.expr, None
            if carrier:
                bounds = program.range_constraints[expression]
                ranks = range(int(bounds.lower), int(bounds.upper) + 1)
            place = "the active rank" if carrier else f"input {node.name}, dimension {dimension}"
            found.append(_Symbol(place, size, expression, len(size.node.shape_env.guards), ranks))
    return found


def _check_symbols(symbols: Sequence[_Symbol]) -> None:
    """Refuse what was compiled for some sizes only.

    A live compile makes a guard of whatever it takes for given about a size, or an error; ahead of time it is taken
    for given, and other sizes give wrong numbers.
    """
    problems = []
    for symbol in symbols:
        now, guards = symbol.size.node.expr, symbol.size.node.shape_env.guards[symbol.guards :]
        if now != symbol.expression:
            problems.append(f"{symbol.place}: {now}")
        elif symbol.ranks is not None:
            own = [g.expr for g in guards if g.expr.free_symbols == {symbol.expression}]
            failing = [g for g in own if not all(g.subs({symbol.expression: rank}) for rank in symbol.ranks)]
            problems += [f"{symbol.place}: {g}" for g in failing]
    if problems:
        raise AdapterError(
            "sizes that have to stay free were compiled for some values only, so no package was written:\n"
            f"{listing(problems)}\nPackage it with rank='static' if it is the rank, else with that size fixed."
        )


def _outputs(program: ExportedProgram) -> list[str]:
    """A name for each output tensor: its key where the output is a dict or a dataclass."""
    root = program.module_call_graph[0].signature
    assert root is not None
    tree = pytree.tree_unflatten(list(range(root.out_spec.num_leaves)), root.out_spec)
    return [pytree.keystr(path).strip("[]'.") for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _write(
    path: Path,
    program: ExportedProgram,
    content: Mapping[str, Any],
    weights: dict[str, Tensor],
    symbols: Sequence[_Symbol],
    options: dict[str, Any],
) -> None:
    # Inductor writes one-dimensional constants of up to 8 numbers into the code, where no swap reaches them
    options = {**options, "aot_inductor.package": True, "always_keep_tensor_constants": True}
    make_folder(path.parent)
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    files: Any = aot_compile(program.module(check_guards=False), args, kwargs, options)
    _check_symbols(symbols)
    text = json.dumps(content, indent=1)  # the modules in the model's order, which some methods go by
    with replacing(path) as (unfinished,):
        package_files(str(unfinished), files, {MANIFEST: text})
        if weights:
            with zipfile.ZipFile(unfinished, "a") as archive:  # package_pt2 takes text only
                root = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{root}/{WEIGHTS}", save_tensors(weights))
        held = set(load_package(str(unfinished)).aoti_runners["model"].get_constant_fqns())
        lost = [name for name in program.constants if name.startswith("slot.") and name not in held]
        if lost:
            raise AdapterError(f"Inductor folded slots into the code, where no swap reaches them:\n{listing(lost)}")
