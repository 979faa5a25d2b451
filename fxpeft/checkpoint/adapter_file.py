"""What can be said of an adapter's files without its base model: sites, norms, distance, a smaller rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.errors import AdapterError, CheckpointError, listing
from fxpeft.methods import method_of
from fxpeft.methods.blocks import unblocked
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.outside import why_unfit
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.operations.registry import kinds
from fxpeft.passes.targets.regex import limited


@dataclass(frozen=True)
class FileSite:
    """One site in a file.

    Args:
        rank: 0 for a method without one, and for a parameter, whose experts' ranks lie in one tensor.
        shapes: tensor -> its shape. norm: Frobenius norm of the update to the weight, scale and all, of a LoRA, and
            ``None`` for a grouped convolution and a parameter; of another method's parameters.
    """

    name: str
    rank: int
    shapes: dict[str, list[int]]
    parameters: int
    norm: float | None


def site_keys(found: Checkpoint) -> dict[str, dict[str, str]]:
    """Site -> parameter -> key of its tensor."""
    method = method_of(found.config)
    if not method.targeted:
        return {}
    names = {f".{suffix}": name for kind in kinds() for name, suffix in method.keys(kind).items()}
    sites: dict[str, dict[str, str]] = {}
    for key in found.tensors:
        suffix = next((s for s in sorted(names, key=len, reverse=True) if key.endswith(s)), None)
        if suffix is not None:
            sites.setdefault(key.removeprefix(method.prefix).removesuffix(suffix), {})[names[suffix]] = key
    return sites


def site_tensors(found: Checkpoint) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Site -> parameter -> tensor, and what belongs to no site: whole modules, biases, prompts."""
    keys = site_keys(found)
    _check_sites(found, keys)
    used = {key for own in keys.values() for key in own.values()}
    sites = {name: {part: found.tensors[key] for part, key in own.items()} for name, own in keys.items()}
    return sites, {key: tensor for key, tensor in found.tensors.items() if key not in used}


def _check_sites(found: Checkpoint, keys: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse tensors that no site can have, so that what is worked out of them is.

    Raises:
        CheckpointError: no floating-point numbers, a factor without ranks, or not both factors; all are named.
    """
    problems: list[str] = []
    method = method_of(found.config)
    for own in keys.values():
        factor = {part: found.tensors[key] for part, key in own.items() if part in ("lora_A", "lora_B")}
        for part, key in own.items():
            if (why := why_unfit(found.tensors[key], method.dtype(part))) is not None:
                problems.append(f"{key}: {why}")
        for part, tensor in factor.items():
            if tensor.ndim < 2 or not tensor.numel():
                problems.append(f"{own[part]}: expected a matrix with ranks, found {list(tensor.shape)}")
        if len(factor) == 1:
            part, other = ("lora_A", "lora_B") if "lora_A" in factor else ("lora_B", "lora_A")
            problems.append(f"{own[part]}: expected {other} beside it, found none")
    if problems:
        raise CheckpointError(f"{found.source}: tensors that no site can have:\n{listing(problems)}")


def site_scale(config: AdapterConfig, site: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    own = getattr(config, "alpha_pattern", None) or {}
    alpha = pattern_value(own, site, getattr(config, "lora_alpha", rank), "alpha_pattern")
    return float(alpha) / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def of_parameter(config: AdapterConfig, site: str) -> bool:
    """Whether a site in a file is a module for one of its parameters, which ``target_parameters`` named."""
    if not getattr(config, "target_parameters", None):
        return False
    with limited() as budget:
        return config.target_modules is None or not budget.keep(config, config.selector)(site)


def factors(config: AdapterConfig, site: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A ``[rank, in]`` and B ``[out, rank]`` in float64, the scale in B; ``None`` where there are no such two."""
    if config.peft_type != "LORA" or of_parameter(config, site) or not {"lora_A", "lora_B"} <= set(tensors):
        return None
    a, b = tensors["lora_A"].double().flatten(1), tensors["lora_B"].double().flatten(1)
    if (blocks := getattr(config, "use_bdlora", None)) is not None:
        a, b = (unblocked(part, count) for part, count in zip((a, b), blocks.blocks(site), strict=True))
    return None if len(a) != b.shape[1] else (a, b * site_scale(config, site, len(a)))


def product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A, without making it."""
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


@matching()
def inspect_sites(found: Checkpoint) -> list[FileSite]:
    """Every site of a file."""
    sites = []
    for name, tensors in site_tensors(found)[0].items():
        first = tensors.get("lora_A")
        pair = factors(found.config, name, tensors)
        norm: float | None = None
        if pair is not None:
            norm = product_norm(*pair)
        elif first is None:
            norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values() if t.is_floating_point()))
        shapes = {key: list(t.shape) for key, t in tensors.items()}
        count = sum(t.numel() for t in tensors.values())
        rank = 0 if first is None or of_parameter(found.config, name) else len(first)
        sites.append(FileSite(name, rank, shapes, count, norm))
    return sites


@dataclass(frozen=True)
class SiteDistance:
    """How far two adapters' updates of one site are apart: ``|X - Y| / |X|``, ``None`` where they can't be compared."""

    name: str
    ranks: tuple[int, int]
    distance: float | None


@dataclass(frozen=True)
class FileDiff:
    """What two adapters' files differ in. False where nothing does."""

    config: dict[str, tuple[Any, Any]]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[SiteDistance, ...]
    rest: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.config or self.added or self.removed or self.changed or self.rest)


@matching()
def diff_files(before: Checkpoint, after: Checkpoint) -> FileDiff:
    """Compare two adapters: configs, sites, and the updates of the sites that both have."""
    old, new = before.config.to_dict(), after.config.to_dict()
    config = {k: (old.get(k), new.get(k)) for k in dict.fromkeys((*old, *new)) if old.get(k) != new.get(k)}
    (sites, rest), (others, other_rest) = site_tensors(before), site_tensors(after)
    changed = []
    for name in sites:
        if name in others and (found := _distance(before.config, after.config, name, sites[name], others[name])):
            changed.append(found)
    differ = [k for k in dict.fromkeys((*rest, *other_rest)) if not _equal(rest.get(k), other_rest.get(k))]
    added, removed = (tuple(n for n in a if n not in b) for a, b in ((others, sites), (sites, others)))
    return FileDiff(config, added, removed, tuple(changed), tuple(differ))


def _distance(
    old: AdapterConfig, new: AdapterConfig, name: str, x: Mapping[str, Tensor], y: Mapping[str, Tensor]
) -> SiteDistance | None:
    first, second = factors(old, name, x), factors(new, name, y)
    ranks = (len(x.get("lora_A", ())), len(y.get("lora_A", ())))
    if first is None or second is None or first[0].shape[1:] != second[0].shape[1:]:
        same = set(x) == set(y) and all(_equal(x[k], y[k]) for k in x)
        return None if same else SiteDistance(name, ranks, None)
    extra = [k for k in dict.fromkeys((*x, *y)) if k not in ("lora_A", "lora_B") and not _equal(x.get(k), y.get(k))]
    if extra:
        return SiteDistance(name, ranks, None)
    if all(t.shape == u.shape and torch.equal(t, u) for t, u in zip(first, second, strict=True)):
        return None
    apart = product_norm(torch.cat([first[0], second[0]]), torch.cat([first[1], -second[1]], 1))
    size = product_norm(*first)
    return SiteDistance(name, ranks, apart / size if size else math.inf if apart else 0.0)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def cast(found: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same adapter in another dtype.

    Raises:
        AdapterError: a value that is finite doesn't fit; every such tensor is named.
    """
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in found.tensors.items()}
    over = [k for k, t in tensors.items() if t.is_floating_point() and (t.isinf() & ~found.tensors[k].isinf()).any()]
    if over:
        raise AdapterError(f"{found.source}: values too large for {dtype}:\n{listing(over)}\nUse bfloat16 or float32.")
    return replace(found, tensors=tensors)


@matching()
def shrink(found: Checkpoint, rank: int) -> tuple[Checkpoint, dict[str, float]]:
    """A LoRA of a smaller rank: each update's best approximation (truncated SVD), at the scale it had.

    Returns:
        The adapter, and for each site whose rank was cut ``|W - W'| / |W|`` of its update W.

    Raises:
        AdapterError: no LoRA, or a site whose update is no product of two matrices.
    """
    config = found.config
    if method_of(config).name != "lora" or getattr(config, "lora_bias", False):
        what = "lora_bias" if getattr(config, "lora_bias", False) else method_of(config).name
        raise AdapterError(f"{found.source}: only a plain LoRA can be given a smaller rank; found {what}")
    if rank < 1:
        raise AdapterError(f"rank: expected a positive number, found {rank}")
    sites, _ = site_tensors(found)
    keys, tensors, errors = site_keys(found), dict(found.tensors), dict[str, float]()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, own in sites.items():
        if "lora_A" not in own or not all(bool(t.isfinite().all()) for t in own.values()):
            raise AdapterError(f"{name}: expected finite lora_A and lora_B, found NaN, infinity or {', '.join(own)}")
        pair, old = factors(config, name, own), len(own["lora_A"])
        if of_parameter(config, name):
            raise AdapterError(
                f"{name}: it updates a parameter (target_parameters), and the file doesn't say how many experts share "
                "its ranks, so it can't be given a smaller one; train it with a smaller r"
            )
        if pair is None:
            raise AdapterError(f"{name}: a grouped convolution's update can't be given a smaller rank; leave it out")
        ranks[name] = min(rank, old)
        scale = site_scale(config, name, old)
        alphas[name] = scale * (math.sqrt(ranks[name]) if getattr(config, "use_rslora", False) else ranks[name])
        if old <= rank:
            continue
        a, b, errors[name] = _truncated(*pair, rank)
        shapes = {"lora_A": (rank, *own["lora_A"].shape[1:]), "lora_B": (b.shape[0], rank, *own["lora_B"].shape[2:])}
        for part, made in (("lora_A", a), ("lora_B", b / scale if scale else b)):
            tensors[keys[name][part]] = made.reshape(shapes[part]).to(own[part].dtype).contiguous()
    values = config.to_dict()
    values.update(r=rank, rank_pattern=_pattern(ranks, rank), **_alphas(alphas))
    return replace(found, config=type(config).from_dict(values, found.source), tensors=tensors), errors


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best A and B of ``rank``, each with half of the singular values, and the relative error."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    half = s[:rank].sqrt()
    size = float(s.square().sum())
    error = math.sqrt(float(s[rank:].square().sum()) / size) if size else 0.0
    return (half[:, None] * v[:rank]) @ qa.T, (qb @ u[:, :rank]) * half, error


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Sites whose value is another one, by their full names."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _alphas(alphas: Mapping[str, float]) -> dict[str, Any]:
    held: Sequence[float] = list(alphas.values())
    usual = max(set(held), key=held.count) if held else 1.0
    return {"lora_alpha": usual, "alpha_pattern": _pattern(alphas, usual)}
