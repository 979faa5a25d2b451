"""An adapter for engines that take one plain LoRA alone: one rank, one alpha, every other scale folded into B.

What each reads, by its source:

- vLLM 0.33, ``vllm/lora/peft_helper.py`` and ``lora_model.py``: one rank up to ``max_lora_rank``, 512 at most; of
  ``modules_to_save`` one ``score`` or ``classifier``; no bias, DoRA, aLoRA, BD-LoRA, repeated layers, and no start that
  changes the base's weights. (It has patterns and ``use_rslora`` too, which its older releases hadn't.)
- SGLang 0.5.23, ``sglang/srt/lora/lora.py`` and ``lora_config.py``: ``r`` and ``lora_alpha`` for all sites, a list of
  targets, no DoRA, no new tokens; q, k and v (and gate and up) of a layer only together.
- llama.cpp, ``convert_lora_to_gguf.py``, which makes its GGUF of the two files: ``lora_alpha`` over the rank of each
  tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.checkpoint.adapter_file import factors, of_parameter, product_norm, site_keys, site_scale, site_tensors
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.alora import Alora
from fxpeft.methods.base import Method
from fxpeft.methods.config import matching
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import attribute, join

LARGEST = 512  # vLLM's largest max_lora_rank


STACKED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
)


@dataclass(frozen=True)
class Engine:
    """What takes a plain LoRA.

    Args:
        rest: whether it reads what an adapter brings beside its sites. heads: modules of which it reads one whole.
        most: its largest rank. invokes: whether it has aLoRA's invocations.
        together: names of modules of one parent that it multiplies as one, so that it needs all of them.
    """

    name: str
    rest: bool = False
    heads: frozenset[str] = frozenset()
    most: int | None = None
    invokes: bool = False
    together: tuple[frozenset[str], ...] = ()


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("peft", rest=True, invokes=True),
        Engine("vllm", most=LARGEST, heads=frozenset({"score", "classifier"})),
        Engine("sglang", together=STACKED),
        Engine("llama.cpp", invokes=True),
    )
}


@matching()
def for_engine(
    found: Checkpoint, engine: Engine, base: Callable[[], nn.Module] | None = None
) -> tuple[Checkpoint, dict[str, float]]:
    """The same LoRA at one rank and with the scale 1: smaller ranks are filled up with zeros, scales go into B.

    Args:
        base: makes the base model, on the meta device, which is asked for the sizes of modules that the engine needs
            beside a site; they get an update of zeros.

    Returns:
        The adapter, and for each site ``|W - W'| / |W|`` of its update W, made in float64: rounding alone.

    Raises:
        AdapterError: no plain LoRA, or it brings what the engine doesn't read, or no base where one is asked; all is
            named.
    """
    if not engine.rest:
        found = _without_layers(_without_base(found, engine), engine)
    config = found.config
    problems = _problems(found, engine)
    sites, rest = site_tensors(found)
    if (
        not problems
        and engine.most is not None
        and (most := max(len(p["lora_A"]) for p in sites.values())) > engine.most
    ):
        problems.append(f"rank {most} is above its largest, {engine.most}: give --rank {engine.most} or less")
    if problems:
        raise AdapterError(f"{found.source}: {engine.name} can't take it:\n{listing(problems)}")
    rank = max(len(own["lora_A"]) for own in sites.values())
    keys, tensors, errors = site_keys(found), dict(rest), dict[str, float]()
    for name, own in sites.items():
        a, b, scale = own["lora_A"], own["lora_B"], site_scale(config, name, len(own["lora_A"]))
        b = b.double() * scale
        dtype = a.dtype if torch.equal(b.to(a.dtype).double(), b) else torch.float32  # a half would round the scale
        grown = {"lora_A": _filled(a.to(dtype), 0, rank), "lora_B": _filled(b.to(dtype), 1, rank)}
        tensors |= {keys[name][part]: tensor.contiguous() for part, tensor in grown.items()}
        errors[name] = _missed(factors(config, name, own), grown)
    fields: dict[str, Any] = {
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None,
    }  # fmt: skip
    beside = _beside(found.source, engine, sites, base)
    for module, (site, out) in beside.items():
        into, up = (keys[site][part] for part in ("lora_A", "lora_B"))
        tensors[into.replace(site, module)] = torch.zeros_like(tensors[into])
        tensors[up.replace(site, module)] = tensors[up].new_zeros(out, rank)
    listed = isinstance(config.target_modules, list)
    if not listed or beside or config.exclude_modules or config.layers_to_transform is not None:
        fields |= {
            "target_modules": sorted([*sites, *beside]), "exclude_modules": None, "layers_to_transform": None,
            "layers_pattern": None,
        }  # fmt: skip
    return replace(found, config=replace(config, **fields), tensors=tensors), errors


def _beside(
    source: str, engine: Engine, sites: Collection[str], base: Callable[[], nn.Module] | None
) -> dict[str, tuple[str, int]]:
    """Module of the base that the engine needs beside a site -> that site, and how many outputs the module has."""
    needed: dict[str, str] = {}
    for site in sites:
        parent, _, leaf = site.rpartition(".")
        for names in engine.together:
            if leaf in names:
                others = (join(parent, other) for other in sorted(names))
                needed |= {other: site for other in others if other not in sites}
    if not needed:
        return {}
    module, site = next(iter(needed.items()))
    if base is None:
        raise AdapterError(
            f"{source}: {engine.name} takes {site} only with {module}, whose size the base says: give it (--model)"
        )
    model, found = base(), dict[str, tuple[str, int]]()
    for module, site in needed.items():
        try:
            found[module] = site, len(attribute(submodule(model, module), "weight"))
        except AttributeError:  # this base has none, so neither has the engine
            continue
    return found


def split(found: Checkpoint) -> tuple[Checkpoint, Checkpoint | None]:
    """A LoRA's sites alone, and what it brings beside them as an adapter of its own; ``None`` for nothing.

    The latter has the same sites with an update of nothing, so that PEFT and this library load it, and fold it into the
    base's weights: what an engine serves then.
    """
    sites, rest = site_tensors(found)
    beside = {key: tensor for key, tensor in rest.items() if key not in _base_keys(sites)}
    if not beside or method_of(found.config).name not in ("lora", Alora.name):
        return found, None
    keys, nothing = site_keys(found), dict[str, Tensor]()
    for name, own in sites.items():
        for part, key in keys[name].items():
            ranks = 0 if part == "lora_A" else 1
            nothing[key] = torch.zeros_like(own[part].narrow(ranks, 0, 1) if own[part].ndim > 1 else own[part])
    plain: dict[str, Any] = {
        "r": 1, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True,
        "eva_config": None, "corda_config": None, "lora_ga_config": None,
    }  # fmt: skip
    none: dict[str, Any] = {
        "modules_to_save": None, "bias": "none", "trainable_token_indices": None, "ensure_weight_tying": False,
    }  # fmt: skip
    tensors = {key: tensor for key, tensor in found.tensors.items() if key not in beside}
    return (
        replace(found, config=found.config.changed(**none), tensors=tensors),
        replace(
            found,
            config=found.config.changed(**plain),
            tensors={**nothing, **beside},
        ),
    )


def _base_keys(sites: Collection[str]) -> set[str]:
    """The keys of the weights of embeddings that are sites, which PEFT's files have too."""
    return {f"{Method.prefix}{name}.base_layer.weight" for name in sites}


def _without_base(found: Checkpoint, engine: Engine) -> Checkpoint:
    """Without the weights of embeddings that are sites, which PEFT's files have too."""
    if not (left := sorted(_base_keys(site_tensors(found)[0]) & found.tensors.keys())):
        return found
    warnings.warn(
        f"{engine.name} has the base's embeddings of its own, so these are left out:\n{listing(left)}\nIf the "
        "vocabulary was resized in training, serve a base that was saved with it",
        stacklevel=4,
    )
    return replace(found, tensors={key: tensor for key, tensor in found.tensors.items() if key not in left})


def _without_layers(found: Checkpoint, engine: Engine) -> Checkpoint:
    """Without the request for repeated layers, which no engine follows; each layer's factors are there."""
    layers = getattr(found.config, "layer_replication", None)
    if not layers:
        return found
    warnings.warn(
        f"{engine.name} repeats no layers (layer_replication): serve a base that has them, such as one of the config "
        f"and the state_dict of a model after fxpeft.replicate_layers(model, {layers})",
        stacklevel=4,
    )
    return replace(found, config=found.config.changed(layer_replication=None))


def _problems(found: Checkpoint, engine: Engine) -> list[str]:
    config, (sites, rest) = found.config, site_tensors(found)
    name = method_of(config).name
    if name != "lora" and not (name == Alora.name and engine.invokes):
        return [f"it is {name}, and only a plain LoRA goes in"]
    problems = [f"{name}: an update of a parameter (target_parameters)" for name in sites if of_parameter(config, name)]
    odd = {name: sorted(own.keys() - {"lora_A", "lora_B"}) for name, own in sites.items()}
    problems += [f"{name}: {', '.join(more)}: a LoRA has A and B alone there" for name, more in odd.items() if more]
    grouped = [name for name, own in sites.items() if "lora_B" in own and own["lora_B"].shape[1] != len(own["lora_A"])]
    problems += [f"{name}: a grouped convolution's" for name in grouped]
    if not engine.rest:
        owners = {key: key.rpartition(".")[0].rpartition(".")[2] for key in rest}
        heads = engine.heads & set(owners.values())
        problems += [
            f"{key}: it reads nothing beside the sites (whole modules, biases, rows of tokens): split those off "
            "(--rest FOLDER), fold that into the base, and serve what comes out"
            for key, owner in owners.items()
            if owner not in heads or len(heads) > 1  # one of them it reads whole
        ]
    return problems


def _filled(tensor: Tensor, dimension: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat((tensor, tensor.new_zeros(shape)), dimension)


def _missed(before: tuple[Tensor, Tensor] | None, after: Mapping[str, Tensor]) -> float:
    """How much of an update is missed by what takes its place."""
    assert before is not None
    a, b = after["lora_A"].double().flatten(1), after["lora_B"].double().flatten(1)
    size = product_norm(*before)
    apart = product_norm(torch.cat((before[0], a)), torch.cat((before[1], -b), 1))
    return apart / size if size else apart
