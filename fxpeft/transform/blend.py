"""Blend: several LoRAs become one new one, by the combination rules of PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fxpeft.adapters.change import changes
from fxpeft.adapters.installing import check_name
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.values import Values
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.targets.kinds import Kind
from fxpeft.transform.derived import add_lora, brought, factorise, in_order, refactorise, refuse_parameters
from fxpeft.transform.task_vectors import PRUNING, Sign, merge

Combination = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


@changes
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Sign = "total",
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Add a LoRA that is a weighted combination of others, and make it the active one; it is frozen.

    Arguments, defaults and results are those of PEFT's ``LoraModel.add_weighted_adapter``:

    - ``cat``: exactly the weighted sum of the updates, at the sum of the ranks. ``svd``: the nearest
      to that of rank ``svd_rank``, by default the largest of the ranks.
    - ``linear``: factors are added, not updates: cheap, and with several adapters rough, since each A
      then meets each B.
    - ``magnitude_prune``, ``dare_linear``, ``ties``, ``dare_ties``: so too, with entries pruned to
      ``density`` first (the smallest, or at random) and, for TIES, those of the minority's sign
      left out. ``..._svd``: the same of the whole updates, and the nearest to that of ``svd_rank``.

    PEFT's results differ where these are wrong: here the scale of the new adapter is 1 with rsLoRA
    too (PEFT: the root of the rank), ``lora_bias`` is combined (PEFT: zero), ``modules_to_save`` and
    ``bias`` of the one adapter that has them are taken over (PEFT: the base's, or dropped), layers
    that only the first adapter excludes are kept, convolutions of other dimensions than two and
    ranks above a layer's size are decomposed (PEFT fails), and grouped convolutions are joined group
    by group. One adapter alone is combined as asked (PEFT: always ``linear``).

    Args:
        adapters: names of LoRAs; a strength set by :func:`fxpeft.set_scale` counts.
        weights: one for each, of either sign.
        svd_clamp: a quantile at which the factors' entries are cut.
        svd_full_matrices, svd_driver: as in ``torch.linalg.svd``; they change no result.
        density: share of the entries to keep, above 0 and at most 1.
        generator: for dare; the global random numbers by default. Layers stored ``[out, in]`` draw as in PEFT.

    Raises:
        AdapterError: unknown or unfit adapters or arguments; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    check_name(model, name)
    sources = [state.get(n) for n in adapters]
    _check_arguments(sources, weights, combination_type, density, majority_sign_method, svd_rank, svd_clamp)
    rule = combination_type.removesuffix("_svd")
    whole = combination_type.endswith("svd")
    values = brought(sources)
    sites = in_order(model, sources)
    weighted = [(adapter, adapter.current(), weight) for adapter, weight in zip(sources, weights, strict=True)]
    shares = {site: _shares(site, weighted) for site in sites}
    _check_sites(model, shares, rule, whole)
    rank = svd_rank or max(share.rank for each in shares.values() for share in each)
    biased = any(share.bias is not None for each in shares.values() for share in each)
    for site, each in shares.items():
        kind = each[0].kind
        if rule == "cat":
            a, b = _joined(kind, each)
        elif rule == "svd" and svd_clamp is None:
            stacked = torch.cat([s.a * s.factor for s in each]), torch.cat([kind.rows(s.b) for s in each])
            a, b = refactorise(kind, *stacked, rank)
        elif whole:
            deltas = [kind.delta(s.a, kind.rows(s.b)) * s.scaling for s in each]
            delta = merge(
                rule, deltas, [s.weight for s in each], density=density, majority_sign_method=majority_sign_method,
                generator=generator,
            )  # fmt: skip
            a, b = factorise(kind, delta, rank, clamp=svd_clamp, full_matrices=svd_full_matrices, driver=svd_driver)
        else:
            roots = [math.sqrt(abs(s.factor)) for s in each]
            signed = [math.copysign(root, s.factor) for root, s in zip(roots, each, strict=True)]
            a, b = (
                merge(
                    rule, vectors, factors, density=density, majority_sign_method=majority_sign_method,
                    generator=generator,
                )
                for vectors, factors in (([s.a for s in each], signed), ([s.b for s in each], roots))
            )  # fmt: skip
        parts = {"lora_A": a, "lora_B": b}
        if biased:
            zero = a.new_zeros(kind.out_features)
            parts["lora_B_bias"] = sum((s.bias * s.factor for s in each if s.bias is not None), zero)
        values.sites[site] = {key: value.to(each[0].dtype) for key, value in parts.items()}
    add_lora(model, name, values, sources, inference_mode=True)


@dataclass(frozen=True)
class _Share:
    """One adapter's part in a blend at one site: its factors in float32 and what multiplies them."""

    adapter: str
    kind: Kind
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    weight: float
    dtype: torch.dtype

    @property
    def factor(self) -> float:
        return self.scaling * self.weight

    @property
    def rank(self) -> int:
        return len(self.a)


def _shares(site: str, sources: Iterable[tuple[Adapter, Values, float]]) -> list[_Share]:
    found = []
    for adapter, values, weight in sources:
        if site not in adapter.plan.sites:
            continue
        plan = adapter.site_plan(site)
        parts = {k: v.detach() for k, v in values.sites[site].items()}
        a, b, bias = parts["lora_A"], parts["lora_B"], parts.get("lora_B_bias")
        own = None if bias is None else bias.float()
        found.append(_Share(adapter.name, plan.kind, a.float(), b.float(), own, plan.scaling, float(weight), a.dtype))
    return found


def _joined(kind: Kind, shares: list[_Share]) -> tuple[Tensor, Tensor]:
    """Factors side by side along the rank; a grouped convolution's group by group, as its B reads them."""
    a = torch.cat([(s.a * s.factor).view(kind.groups, -1, *s.a.shape[1:]) for s in shares], dim=1)
    return a.flatten(0, 1), torch.cat([s.b for s in shares], dim=1)


def _check_arguments(
    sources: Sequence[Adapter], weights: Sequence[float], combination: str, density: float | None, sign: str,
    rank: int | None, clamp: float | None,
) -> None:  # fmt: skip
    known = get_args(Combination)
    if combination not in known:
        raise AdapterError(f"combination_type: expected one of {', '.join(known)}, found {combination!r}")
    if not sources or len(sources) != len(weights) or not all(math.isfinite(w) for w in weights):
        raise AdapterError(f"weights: expected one finite number for each of {len(sources)} adapters, found {weights}")
    unfit = [f"{a.name}: {method_of(a.config).name}" for a in sources if method_of(a.config).name != "lora"]
    refuse_parameters(sources, "a blend")
    if unfit:
        raise AdapterError(f"only LoRAs can be blended, found\n{listing(unfit)}\nconvert them to LoRA first")
    prunes = combination.removesuffix("_svd") in PRUNING
    if prunes and (density is None or not 0 < density <= 1):
        raise AdapterError(f"density: {combination} needs a number above 0 and at most 1, found {density}")
    if sign not in get_args(Sign):
        raise AdapterError(f"majority_sign_method: expected one of {', '.join(get_args(Sign))}, found {sign!r}")
    if rank is not None and rank <= 0:
        raise AdapterError(f"svd_rank: expected a positive integer, found {rank}")
    if clamp is not None and not 0 <= clamp <= 1:
        raise AdapterError(f"svd_clamp: expected a quantile between 0 and 1, found {clamp}")
    if prunes and any("lora_B_bias" in parts for a in sources for parts in a.values.sites.values()):
        raise AdapterError(f"lora_bias has no part in {combination}; use cat, svd or linear")


def _check_sites(model: nn.Module, shares: dict[str, list[_Share]], rule: str, whole: bool) -> None:
    problems = []
    for site, each in shares.items():
        ranks = {s.adapter: s.rank for s in each}
        if rule != "cat" and not whole and len(set(ranks.values())) > 1:
            problems.append(f"{site}: {rule} needs equal ranks, found {ranks}; use cat or an svd type")
        if whole and each[0].kind.groups > 1:
            why = each[0].kind.why_no_delta(submodule(model, site))
            problems.append(f"{site}: {why}; use cat or linear")
    if problems:
        raise AdapterError(f"these adapters can't be blended so; nothing was changed.\n{listing(problems)}")
