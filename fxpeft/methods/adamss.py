"""AdaMSS, as PEFT has it: the outputs fall into groups, each with a small LoRA of the base's first singular vectors.

    y = base(x) + sum over groups g of P_g B_g A_g V [x, 1]

V and the groups follow from the base's weight, beside which its bias is a column; P_g puts a group's outputs to their
places. V is in a file, and which outputs are in a group is in none: they are found again in the base.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import exact
from fxpeft.methods.parts import check_linear
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import PassError
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

A, B, V = "adamss_A", "adamss_B", "adamss_newB"
SIZES, GROUPS, PLACES = "adamss_sizes", "adamss_groups", "adamss_places"
NUMBERED = re.compile(rf"(.+)\.({A}|{B})\.(\d{{1,9}})")
MOST_GROUPS, MOST_RANKS = 1024, 64  # what a file names, and its tensors needn't have


@dataclass
class AdamssConfig(AdapterConfig):
    """Names and defaults of ``peft.AdamssConfig``, without the fields of ASA.

    Args:
        r: how many singular vectors. num_subspaces: how many groups; the means of singular vectors part the outputs.
        subspace_rank: rank of a group's LoRA. use_dynamic_rank: of what its singular values are above
            ``svd_threshold`` of the largest, at most that rank.
        random_seed: what the singular vectors are found with.
        init_weights: B starts as zeros; ``None``, or ``False``: near zero, at random.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: bool | Literal["orthogonal"] | None = "orthogonal"
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    exclude_modules: None = field(default=None, init=False)  # no field of PEFT's AdaMSS

    peft_type: ClassVar[str] = "ADAMSS"
    unsupported: ClassVar[Mapping[str, Any]] = {
        "use_asa": False, "asa_target_subspaces": 50, "init_warmup": 50, "final_warmup": 1000, "mask_interval": 100,
        "asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85, "asa_schedule_exponent": 3.0,
    }  # fmt: skip
    reasons: ClassVar[Mapping[str, str]] = {
        "use_asa": "groups don't stop training one by one here; what was trained so loads"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "num_subspaces", "subspace_rank")
        self.check_at_most(MOST_GROUPS, "num_subspaces")
        self.check_at_most(MOST_RANKS, "subspace_rank")
        if self.init_weights is True:
            raise AdapterError("init_weights: expected 'orthogonal', None or False, found True")


@dataclass(frozen=True)
class AdamssPlan(SitePlan):
    """``vectors`` V has, of inputs and, where the site is ``biased``, one more; ``groups`` of ``per_group`` ranks."""

    vectors: int = 0
    groups: int = 0
    per_group: int = 0
    biased: bool = False


@one_node
def put(b: Tensor, groups: Tensor, places: Tensor, count: int) -> Tensor:
    """All groups' B ``[out, count * ranks]``, each at its outputs and ranks.

    Args:
        b: of one group below the other, ``[out, ranks]``. groups: of each of its rows. places: row of each output.
    """
    member = groups[places].unsqueeze(1) == torch.arange(count, device=b.device)
    return (member.unsqueeze(2) * b[places].unsqueeze(1)).flatten(1)


def adamss(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    adamss_A: Tensor,
    adamss_B: Tensor,
    adamss_newB: Tensor,
    adamss_groups: Tensor,
    adamss_places: Tensor,
    count: int,
    biased: bool,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    h = kind.reduce(x, adamss_newB[:, : kind.in_features])
    h = h + adamss_newB[:, kind.in_features] if biased else h
    h = kind.reduce(h, adamss_A.flatten(0, 1))
    out: Tensor = (y + kind.expand(h, put(adamss_B, adamss_groups, adamss_places, count))).type_as(y)
    return out


@functools.lru_cache(maxsize=64)
def _of(count: int, biased: bool) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(adamss, count=count, biased=biased)


def parted(config: AdamssConfig, plan: AdamssPlan, base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """The base's first singular vectors, left ``[out, n]`` and right ``[n, in]``, and the group of each output.

    Raises:
        AdapterError: scikit-learn, whose groups they are in PEFT, is missing; or a group is empty.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise AdapterError("AdaMSS needs scikit-learn, as in PEFT: pip install 'fxpeft[adamss]'") from None
    weight, bias = base.weight(), base.bias()
    whole = weight if bias is None else torch.cat([weight, bias.to(weight.device).unsqueeze(1)], 1)
    with torch.random.fork_rng(devices=[whole.device] if whole.is_cuda else []):
        torch.manual_seed(config.random_seed)
        u, _, v = torch.svd_lowrank(whole, q=plan.vectors, niter=2)
    means = KMeans(n_clusters=plan.groups, init="random", n_init=1, max_iter=10, random_state=123456789)
    groups = torch.from_numpy(means.fit_predict(u.cpu().numpy())).long()
    if (sizes := torch.bincount(groups, minlength=plan.groups)).min() == 0:
        raise AdapterError(f"num_subspaces: {plan.groups} groups of its outputs are of {sizes.tolist()}: take fewer")
    return u, v.t(), groups.to(u.device)


def first_a(data: Tensor, ranks: int) -> Tensor:
    """A ``[ranks, n]`` of a group whose left singular vectors are ``[outputs, n]``; its randomness is PEFT's."""
    u, _, _ = torch.svd_lowrank(data @ data.t(), q=ranks, niter=2)
    first: Tensor = torch.linalg.qr(data.t() @ u[:, :ranks])[0].t()
    return first


class Adamss(Method[AdamssConfig]):
    """``adamss_A`` [groups, ranks, n] and ``adamss_B`` [out, ranks], one group's rows below the other's.

    Both are zero beyond a group's own rank. ``adamss_newB`` [n, in] or [n, in + 1], ``adamss_sizes`` [groups],
    ``adamss_groups`` and ``adamss_places`` [out] stay.
    """

    name = "adamss"
    peft_type = "ADAMSS"
    needs: ClassVar = {"adamss": ("shift",)}
    config_class = AdamssConfig
    found_in_base = True
    integers = (GROUPS, PLACES)
    numbered = (A, B)

    def plan(self, config: AdamssConfig, site: str, kind: Kind) -> AdamssPlan:
        check_linear("AdaMSS", site, kind)
        return _planned(config, kind, False)

    def arranged(self, config: AdamssConfig, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        biased = {site: getattr(submodule(model, site), "bias", None) is not None for site in plans}
        return {site: _planned(config, plan.kind, biased[site]) for site, plan in plans.items()}

    def shapes(self, config: AdamssConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        own, out = _own(plan), plan.kind.out_features
        return {
            A: (own.groups, own.per_group, own.vectors), B: (out, own.per_group),
            V: (own.vectors, plan.kind.in_features + own.biased), SIZES: (own.groups,), GROUPS: (out,), PLACES: (out,),
        }  # fmt: skip

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (A, B, V, SIZES)}

    def frozen(self, config: AdamssConfig) -> Collection[str]:
        return (GROUPS, PLACES)

    def untrained(self, config: AdamssConfig) -> Collection[str]:
        return (V, SIZES)

    def initialise(self, config: AdamssConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        own = _own(plan)
        u, v, groups = parted(config, own, base)
        _arrange(parameters, groups)
        parameters[V].copy_(v)
        parameters[SIZES].copy_(torch.bincount(groups, minlength=own.groups))
        for name in (A, B):
            parameters[name].zero_()
        end = 0
        for group in range(own.groups):
            data = u[groups == group]
            start, end, ranks = end, end + len(data), min(len(data), own.per_group)
            if config.use_dynamic_rank:
                _, s, _ = torch.svd_lowrank(data @ data.t(), q=len(data), niter=2)
                ranks = max(1, min(int((s > config.svd_threshold * s[0]).sum()), ranks))
            parameters[A][group, :ranks].copy_(first_a(data, ranks))
            if config.init_weights != "orthogonal":
                parameters[B][start:end, :ranks].normal_(std=0.01)

    def restore(self, config: AdamssConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """As PEFT when it loads: the base's weight is decomposed again, and its outputs parted."""
        own = _own(plan)
        groups = parted(config, own, base)[2]
        _arrange(parameters, groups)
        here, said = torch.bincount(groups, minlength=own.groups).tolist(), parameters[SIZES].tolist()
        if here != said:
            raise PassError(f"its outputs fall into groups of {here} here, and of {[int(n) for n in said]} in the file")

    def stored(
        self, config: AdamssConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        found, end = {V: parameters[V]}, 0
        for group, size in enumerate(torch.bincount(parameters[GROUPS], minlength=_own(plan).groups).tolist()):
            start, end, a = end, end + size, parameters[A][group]
            used = a.detach().abs().amax(1).nonzero()
            last = int(used[-1]) + 1 if config.use_dynamic_rank and len(used) else len(a)
            ranks = min(size, last)
            found |= {f"{A}.{group}": a[:ranks], f"{B}.{group}": parameters[B][start:end, :ranks]}
        return found

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        own, _, number = name.partition(".")
        return super().key(site, plan, own) + (f".{number}" if number else "")

    def read(self, config: AdamssConfig, tensors: dict[str, Tensor]) -> tuple[AdamssConfig, dict[str, Tensor]]:
        left = {key: tensor for key, tensor in tensors.items() if not NUMBERED.fullmatch(key)}
        sites: dict[str, dict[tuple[str, int], Tensor]] = {}
        for key, tensor in tensors.items():
            if m := NUMBERED.fullmatch(key):
                sites.setdefault(m[1], {})[m[2], int(m[3])] = tensor
        for site, parts in sites.items():
            count = len(parts) // 2
            pairs = [(parts.get((A, n)), parts.get((B, n))) for n in range(count)]
            if len(parts) != 2 * count or count > MOST_GROUPS:
                raise CheckpointError(f"{site}: expected {A} and {B} of each group, found {[*parts][:6]}")
            left |= {f"{site}.{name}": tensor for name, tensor in _stacked(config, site, pairs).items()}
        return config, left

    def rewrite(self, name: str, config: AdamssConfig, site: SiteAdapter) -> Rewrite:
        plan = _own(site.plan)
        held = site.operands(name, (A, B, V, GROUPS, PLACES))
        return Rewrite(f"adamss:{name}", _of(plan.groups, plan.biased), held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        own, into = _own(plan), plan.kind.in_features
        values = exact({name: parameters[name] for name in (A, B, V)})
        b = put(values[B], parameters[GROUPS], parameters[PLACES], own.groups)
        a, v = values[A].flatten(0, 1), values[V]
        a, b = (a @ v, b) if len(a) <= len(v) else (v, b @ a)
        shift = (b @ a[:, into]) * plan.scaling if own.biased else b.new_zeros(len(b))
        return SlotValues(a[:, :into], b.t(), torch.full((len(a),), plan.scaling), shift=shift)

    def kept(self, config: AdamssConfig, plan: SitePlan) -> Kept:
        own = _own(plan)
        return Kept(input=False, own=own.vectors + own.groups * own.per_group)

    def scales(self, config: AdamssConfig) -> bool:
        return False


def _own(plan: SitePlan) -> AdamssPlan:
    assert isinstance(plan, AdamssPlan)
    return plan


def _planned(config: AdamssConfig, kind: Kind, biased: bool) -> AdamssPlan:
    vectors = min(config.r, kind.out_features, kind.in_features + biased)
    groups, ranks = min(config.num_subspaces, kind.out_features), min(config.subspace_rank, vectors)
    return AdamssPlan(
        kind, min(groups * ranks, vectors), 1.0, vectors=vectors, groups=groups, per_group=ranks, biased=biased
    )


def _arrange(parameters: Mapping[str, Tensor], groups: Tensor) -> None:
    """The group of each row of B, and the row of each output."""
    order = groups.argsort(stable=True)
    parameters[GROUPS].copy_(groups[order])
    parameters[PLACES].copy_(order.argsort())


def _stacked(config: AdamssConfig, site: str, pairs: list[tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
    """One A and one B of those that a file has for each group, and the groups' sizes.

    Raises:
        CheckpointError: their shapes don't fit together.
    """
    first = pairs[0][0] if pairs else None
    most = min(config.subspace_rank, first.shape[-1] if first is not None and first.ndim else 0)
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, (a, b) in enumerate(pairs):
        if first is None or a is None or b is None or not (a.ndim == b.ndim == 2 and len(a) == b.shape[1] <= most):
            found = [None if t is None else list(t.shape) for t in (a, b)]
            raise CheckpointError(
                f"{site}: group {number}: expected {A} [ranks, n] and {B} [outputs, ranks], of at most {most} ranks, "
                f"found {found}"
            )
        if a.shape[1] != first.shape[1]:
            raise CheckpointError(f"{site}: {A}.{number}: expected [ranks, {first.shape[1]}], found {list(a.shape)}")
        made[0].append(F.pad(a, (0, 0, 0, most - len(a))))
        made[1].append(F.pad(b, (0, most - len(a))))
    sizes = torch.tensor([float(len(b)) for b in made[1]])
    return {A: torch.stack(made[0]), B: torch.cat(made[1]), SIZES: sizes}
