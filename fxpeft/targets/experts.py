"""Experts that were modules of their own once: their projections' names in a config, one LoRA for each in a file.

Since Transformers 5 a model holds all experts' projections stacked in one parameter, gate and up as one. Which
parameter took the place of which projections stands in Transformers' own conversion of the base's weights.
PEFT converts a config that names the old projections (:func:`converted`, as
``peft.utils.transformers_weight_conversion`` does) and a file that holds a LoRA for each (:func:`fuse`): the fused
factor A stacks the projections' As, the fused B has their Bs as blocks, so that its rank is the sum of theirs.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)

from fxpeft.errors import AdapterError, CheckpointError, listing
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.modules import Modules
from fxpeft.passes.targets.names import Selection, pattern_value
from fxpeft.passes.targets.regex import compiled
from fxpeft.passes.targets.terms import Pattern
from fxpeft.targets.resolve import has_pattern, spelled, with_parameter_names


@dataclass(frozen=True)
class Stack:
    """A parameter that holds a projection of every expert, or several side by side.

    Args:
        site: the parameter's name. shape: ``[experts, out of all branches, in]``.
        branches: the names that its projections had as modules ``<container>.<expert>.<branch>``, in order.
    """

    site: str
    shape: tuple[int, ...]
    branches: tuple[str, ...]

    @property
    def container(self) -> str:
        """The module that holds the parameter, where the experts were."""
        return self.site.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The parameter's own name."""
        return self.site.rpartition(".")[2]


def stacks(model: nn.Module | Modules, conversions: Iterable[WeightTransform] | None = None) -> list[Stack]:
    """The stacked parameters of a Transformers model whose experts were modules before; empty for other models."""
    modules = Modules.of(model)
    if not isinstance(modules.model, PreTrainedModel):
        return []
    named = [
        (f"{name}.{leaf}", tuple(p.shape))
        for name, module in modules.items()
        for leaf, p in module._parameters.items()
        if p is not None and p.ndim == 3 and not getattr(module, "is_transposed", False)
    ]
    if not named:
        return []
    known = _fusions(get_model_conversion_mapping(modules.model) if conversions is None else conversions)
    found = []
    for site, shape in named:
        branches = next((b for target, b in known.items() if f".{site}".endswith(f".{target}")), None)
        if branches is not None and shape[1] % len(branches) == 0:
            found.append(Stack(site, shape, branches))
    return found


def _fusions(conversions: Iterable[WeightTransform]) -> dict[str, tuple[str, ...]]:
    """End of a stacked parameter's name -> the projections that it holds, as Transformers stacks a base's weights."""
    found: dict[str, tuple[str, ...]] = {}
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
            continue
        operations = conversion.operations
        stacked = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        beside = [isinstance(o, Concatenate) and o.dim == 1 for o in operations[1:]]
        if not stacked or len(beside) > 1 or not all(beside):
            continue
        target = conversion.target_patterns[0].strip(".")
        container = target.rpartition(".")[0]
        sources = [s.replace(r"\.", ".").strip(".") for s in conversion.source_patterns]
        parts = [re.fullmatch(rf"{re.escape(container)}\.\*\.(\w+)\.weight", source) for source in sources]
        if all(parts):
            found[target] = tuple(part[1] for part in parts if part is not None)
    return found


@matching()
def converted(model: nn.Module | Modules, config: AdapterConfig) -> AdapterConfig:
    """A new adapter's config with the stacked parameters in the place of expert projections that it names.

    PEFT's rule: a name that ends in a projection's means the experts', in every layer; dense modules of that
    name are left out, which is said. Gate and up together have twice the rank and alpha.

    Raises:
        AdapterError: only some of the projections that one parameter holds are named, or the method is no LoRA.
    """
    targets = config.target_modules
    if targets is None or isinstance(targets, Pattern) or has_pattern(targets) or has_pattern(config.exclude_modules):
        return config
    if targets == "all-linear" or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return config  # every linear module, and these are none
    modules = Modules.of(model)
    found, architecture = stacks(modules), type(modules.model).__name__
    named = {stack.site: [b for b in stack.branches if _names(targets, stack, b)] for stack in found}
    hit = [stack for stack in found if named[stack.site]]
    if not hit:
        return config
    for stack in hit:
        if len(named[stack.site]) < len(stack.branches):
            rest = [b for b in stack.branches if b not in named[stack.site]]
            raise AdapterError(
                f"target_modules: {', '.join(named[stack.site])} without {', '.join(rest)}: {architecture} "
                f"holds them as one in {stack.site}, so name all of them, or none"
            )
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"target_modules names projections of experts, which {architecture} holds stacked in "
            f"{hit[0].site}; {config.peft_type} takes modules alone. Leave the name out, or use LoRA"
        )
    old = {b for stack in hit for b in stack.branches}
    before = config.selector().select(modules)
    left = [name for name in before if name.rpartition(".")[2] in old]
    if left:
        warnings.warn(
            f"target_modules names projections of experts, so these modules of the same name are left out, as PEFT "
            f"does:\n{listing(left)}\nAn adapter of their own takes them, by a regular expression",
            stacklevel=3,
        )
    if isinstance(targets, str):
        kept: str | list[str] = spelled([n for n in before if n not in left], modules)
    else:
        kept = [t for t in targets if t.rpartition(".")[2] not in old]
    leaves = {stack.leaf: len(stack.branches) for stack in hit}
    wide = {rf".*\.{re.escape(leaf)}": count for leaf, count in leaves.items() if count > 1}
    return _with_parameters(
        modules, config, list(leaves), kept,
        {**config.rank_pattern, **{key: config.r * count for key, count in wide.items()}},
        {**config.alpha_pattern, **{key: config.lora_alpha * count for key, count in wide.items()}},
    )  # fmt: skip


def _names(targets: str | Iterable[str], stack: Stack, branch: str) -> bool:
    if isinstance(targets, str):
        named = compiled(targets, "target_modules").fullmatch
        return any(named(f"{stack.container}.{inner}{branch}") for inner in ("0.", ""))
    return any(target.rpartition(".")[2] == branch for target in targets)


def _with_parameters(
    modules: Modules,
    config: LoraConfig,
    parameters: list[str],
    targets: str | list[str],
    ranks: dict[str, int],
    alphas: dict[str, int | float],
) -> LoraConfig:
    """The config with these ``target_parameters`` added to its own, and these patterns."""
    config = with_parameter_names(copy.deepcopy(config), modules)  # a pattern or expression can't have names beside it
    own = config.target_parameters or []
    assert not isinstance(own, str | Pattern)
    return replace(
        config, target_modules=targets, target_parameters=sorted({*own, *parameters}), rank_pattern=ranks,
        alpha_pattern=alphas,
    )  # fmt: skip


# --- one LoRA for each expert, from a file ---


@dataclass
class Fused:
    """One LoRA of a stacked parameter: its factors as PEFT's ``ParamWrapper`` holds them, its rank and alpha."""

    a: Tensor
    b: Tensor
    rank: int
    alpha: int | float


def branch_of(name: str, known: Iterable[Stack]) -> tuple[Stack, int, int] | None:
    """The stack, the expert and the branch that a module's name of before means; ``None`` for any other name."""
    parts = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", name)
    if parts is None:
        return None
    for stack in known:
        if stack.container == parts[1] and parts[3] in stack.branches and int(parts[2]) < stack.shape[0]:
            return stack, int(parts[2]), stack.branches.index(parts[3])
    return None


def fuse(
    stack: Stack, parts: Mapping[tuple[int, int], tuple[str, Mapping[str, Tensor]]], config: LoraConfig, source: str
) -> Fused:
    """One LoRA of the stack from those of its experts' projections; exact, whatever ranks and scales they have.

    Args:
        parts: (expert, branch) -> the module's name in the file, and its ``lora_A`` ``[rank, in]`` and ``lora_B``
            ``[out, rank]``. What is missing adds nothing.

    Raises:
        CheckpointError: a factor is missing or of another shape.
    """
    experts, width, inner = stack.shape
    size = width // len(stack.branches)
    scales = {}
    for place, (name, factors) in parts.items():
        rank = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha, "alpha_pattern")
        for key, shape in {"lora_A": (rank, inner), "lora_B": (size, rank)}.items():
            found = factors.get(key)
            if found is None or tuple(found.shape) != shape:
                was = "none" if found is None else str(list(found.shape))
                raise CheckpointError(
                    f"{source}: {name}.{key}.weight: expected {list(shape)} for one of the {experts} experts that "
                    f"{stack.site} holds, found {was}; nothing was changed. Is it an adapter of another base model?"
                )
        scales[place] = (rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    ranks = [sum(scales[e, j][0] for j in range(len(stack.branches)) if (e, j) in parts) for e in range(experts)]
    total = max(ranks)
    first_rank, first_alpha, scale = next(iter(scales.values()))
    like = next(iter(parts.values()))[1]["lora_A"]
    a, b = like.new_zeros(experts, total, inner), like.new_zeros(experts, width, total)
    filled = [0] * experts
    for (expert, branch), (_, factors) in sorted(parts.items(), key=lambda item: item[0]):
        rank, _, own = scales[expert, branch]
        rows = slice(filled[expert], filled[expert] + rank)
        a[expert, rows] = factors["lora_A"]
        b[expert, branch * size : (branch + 1) * size, rows] = factors["lora_B"] * (1 if own == scale else own / scale)
        filled[expert] += rank
    alpha = scale * math.sqrt(total) if config.use_rslora else first_alpha * total / first_rank
    return Fused(
        a.flatten(0, 1), b.permute(2, 0, 1).flatten(0, 1).t().contiguous(), total,
        int(alpha) if float(alpha).is_integer() else alpha,
    )  # fmt: skip


def with_stacks(
    modules: Modules, config: LoraConfig, fused: Mapping[str, Fused], old: Iterable[str], hosts: Iterable[str]
) -> LoraConfig:
    """The config of a file whose experts were fused: the sites are parameters, with their own ranks and alphas.

    Args:
        fused: site -> its LoRA. old: names of the experts' projections in the file. hosts: names of the other
            modules that the file has tensors for.
    """
    old, hosts, sites = list(old), list(hosts), set(fused)
    parameters = [f"{n}.{leaf}" for n, m in modules.items() for leaf, p in m._parameters.items() if p is not None]
    leaves = sorted({site.rpartition(".")[2] for site in sites})
    names = leaves if set(filter(Selection(leaves), parameters)) == sites else sorted(sites)
    gone = [
        key for field in config.patterns for key in getattr(config, field)
        if any(_hit(key, name, field) for name in old) and not any(_hit(key, name, field) for name in (*hosts, *sites))
    ]  # fmt: skip
    kept = {field: {k: v for k, v in getattr(config, field).items() if k not in gone} for field in config.patterns}
    found: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for field, name, default in (("rank_pattern", "rank", config.r), ("alpha_pattern", "alpha", config.lora_alpha)):
        for leaf in leaves:
            wanted = {site: getattr(fused[site], name) for site in sorted(sites) if site.endswith(f".{leaf}")}
            key = rf".*\.{re.escape(leaf)}"
            if all(pattern_value(kept[field], site, default, field) == value for site, value in wanted.items()):
                continue
            if len(set(wanted.values())) == 1 and not any(_hit(key, host, field) for host in hosts):
                found[field][key] = next(iter(wanted.values()))
            else:
                found[field].update({f"^{re.escape(site)}": value for site, value in wanted.items()})
    targets = config.target_modules
    if not isinstance(targets, str | Pattern) and targets is not None:
        targets = [t for t in targets if any(map(Selection([t]), hosts))]
    elif isinstance(targets, str) and targets.lower() != "all-linear" and not any(map(Selection(targets), hosts)):
        targets = []
    dropout = config.lora_dropout
    if dropout and not config.inference_mode:
        warnings.warn(
            f"lora_dropout={dropout} is off: the experts are parameters, whose update is added whatever the input",
            stacklevel=4,
        )
    ranks, alphas = ({**found[field], **kept[field]} for field in config.patterns)
    fixed = replace(copy.deepcopy(config), lora_dropout=0.0)
    return replace(_with_parameters(modules, fixed, names, [], ranks, alphas), target_modules=targets)


def _hit(pattern: str, name: str, field: str) -> bool:
    return pattern_value({pattern: True}, name, False, field)
