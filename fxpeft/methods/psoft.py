"""PSOFT, as PEFT has it: a rotation of what the weight's largest singular values make of the input.

    y = base(x) + alpha / r * B (b * R * a - I) A dropout(x),    R = (I + Q) (I - Q)^-1,    Q skew-symmetric

with ``alpha / r * B A`` the weight's part of rank r, which is in no file: it is found again in the base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.oft import MOST_TERMS, cayley, neumann
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

KEYS = {"psoft_R": "psoft_R.weight", "psoft_b": "psoft_R.vector_b", "psoft_a": "psoft_R.vector_a"}
FIXED = ("psoft_A", "psoft_B")


@dataclass
class PsoftConfig(AdapterConfig):
    """Names and defaults of ``peft.PsoftConfig``.

    Args:
        r: rank of the part that is rotated. psoft_alpha: the update is scaled by ``psoft_alpha / r``.
        psoft_dropout: on the update's input while training.
        ab_svd_init: the singular values are in B; ``"pissa_init"``: their roots are in both.
        psoft_svd: ``"lowrank"``: by ``psoft_svd_lowrank_niter`` iterations, which ``random_seed`` starts.
        psoft_orth: ``False``: R is any matrix. psoft_mag_b, psoft_mag_a: whether rows and columns of R are multiplied.
        use_cayley_neumann: R by the first ``num_cayley_neumann_terms`` of a series, Q within ``cayley_neumann_eps``.
        init_weights: start with no rotation; ``False``: near it, at random.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "PSOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "num_cayley_neumann_terms", "cayley_neumann_eps")
        self.check_at_most(MOST_TERMS, "num_cayley_neumann_terms")
        self.check_probability("psoft_dropout")


@dataclass(frozen=True)
class PsoftPlan(SitePlan):
    """``terms`` of the series, 0: exact; -1: any matrix. ``bound`` of Q, 0: none."""

    terms: int = 0
    bound: float = 0.0


@one_node
def turn(entries: Tensor, rows: Tensor | None, columns: Tensor | None, size: int, terms: int, bound: float) -> Tensor:
    """``b * R * a - I``, ``[r, r]`` in float32 or wider.

    Args:
        entries: those of Q above its diagonal, or R. rows, columns: b and a. terms, bound: as in the plan.
    """
    exact = entries.to(torch.promote_types(entries.dtype, torch.float32))
    eye = torch.eye(size).to(exact)
    if terms < 0:
        whole = exact
    else:
        places = torch.triu_indices(size, size, 1, device=exact.device)
        above = exact.new_zeros(size, size).index_put((places[0], places[1]), exact)
        q = (above - above.t()).unsqueeze(0)
        if bound:
            length = q.norm()
            q = torch.where(length > bound, q * (bound / (length + 1e-12)), q)
        whole = eye + (neumann(q, terms) if terms else cayley(-q))[0]
    whole = whole if rows is None else rows.type_as(whole).unsqueeze(1) * whole
    whole = whole if columns is None else whole * columns.type_as(whole)
    return whole - eye


def psoft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    psoft_R: Tensor,
    psoft_A: Tensor,
    psoft_B: Tensor,
    scaling: Tensor,
    size: int,
    terms: int,
    bound: float,
    psoft_b: Tensor | None = None,
    psoft_a: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    x = x.type_as(psoft_A)
    h = kind.reduce(x if dropout is None else dropout(x), psoft_A)
    turned = turn(psoft_R, psoft_b, psoft_a, size, terms, bound).type_as(psoft_A)
    out: Tensor = (y + kind.scale(kind.expand(kind.expand(h, turned), psoft_B), scaling)).type_as(y)
    return out


@functools.lru_cache(maxsize=64)
def _of(size: int, terms: int, bound: float) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(psoft, size=size, terms=terms, bound=bound)


class Psoft(Method[PsoftConfig]):
    """Parameters ``psoft_R`` [r (r - 1) / 2] or [r, r], ``psoft_b``, ``psoft_a`` [r]; ``psoft_A``, ``psoft_B`` stay."""

    name = "psoft"
    peft_type = "PSOFT"
    config_class = PsoftConfig
    found_in_base = True

    def plan(self, config: PsoftConfig, site: str, kind: Kind) -> PsoftPlan:
        check_linear("PSOFT", site, kind)
        most = min(kind.in_features, kind.out_features)
        if config.r > most:
            raise AdapterError(
                f"{site}: r: expected at most the {most} singular values of its weight, found {config.r}"
            )
        series = config.use_cayley_neumann
        terms = -1 if not config.psoft_orth else config.num_cayley_neumann_terms if series else 0
        bound = config.cayley_neumann_eps if config.psoft_orth and series else None
        return PsoftPlan(kind, config.r, config.psoft_alpha / config.r, terms, bound or 0.0)

    def shapes(self, config: PsoftConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        r = plan.rank
        shapes: dict[str, tuple[int, ...]] = {"psoft_R": (r * (r - 1) // 2,) if config.psoft_orth else (r, r)}
        shapes |= {"psoft_b": (r,)} if config.psoft_mag_b else {}
        shapes |= {"psoft_a": (r,)} if config.psoft_mag_a else {}
        return {**shapes, "psoft_A": (r, plan.kind.in_features), "psoft_B": (plan.kind.out_features, r)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return KEYS

    def frozen(self, config: PsoftConfig) -> Collection[str]:
        return FIXED

    def initialise(self, config: PsoftConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        turned = parameters["psoft_R"]
        if config.psoft_orth:
            nn.init.zeros_(turned) if config.init_weights else nn.init.normal_(turned, std=0.1)
        else:
            nn.init.eye_(turned)
            if not config.init_weights:
                turned.add_(torch.randn_like(turned) * 0.1)
        for name in parameters.keys() & {"psoft_b", "psoft_a"}:
            nn.init.ones_(parameters[name])
        self.restore(config, plan, parameters, base)

    def restore(self, config: PsoftConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """As PEFT when it loads: the base's weight is decomposed again."""
        weight, r = base.weight(), plan.rank
        if config.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(config.random_seed)
                u, s, v = torch.svd_lowrank(weight, q=r, niter=config.psoft_svd_lowrank_niter)
                vh = v.t()
        s = s[:r] / plan.scaling
        left, right = (s.sqrt(), s.sqrt()) if config.ab_svd_init == "pissa_init" else (s, torch.ones_like(s))
        parameters["psoft_A"].copy_(right.unsqueeze(1) * vh[:r])
        parameters["psoft_B"].copy_(u[:, :r] * left)

    def dropout(self, config: PsoftConfig, kind: Kind) -> float:
        return config.psoft_dropout

    def rewrite(self, name: str, config: PsoftConfig, site: SiteAdapter) -> Rewrite:
        assert isinstance(site.plan, PsoftPlan)
        held = site.operands(name, (*KEYS, *FIXED, "scaling", "dropout"))
        return Rewrite(f"psoft:{name}", _of(site.plan.rank, site.plan.terms, site.plan.bound), held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, PsoftPlan)
        parts = (parameters["psoft_R"], parameters.get("psoft_b"), parameters.get("psoft_a"))
        turned = turn(*parts, plan.rank, plan.terms, plan.bound)
        a, b = (parameters[name].type_as(turned) for name in FIXED)
        return SlotValues(a, (b @ turned).t(), torch.full((plan.rank,), plan.scaling))

    def kept(self, config: PsoftConfig, plan: SitePlan) -> Kept:
        return Kept(input=False, own=2 * plan.rank)
