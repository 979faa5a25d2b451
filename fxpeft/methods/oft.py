"""OFT (https://arxiv.org/abs/2306.07280, v2: https://arxiv.org/abs/2506.19847): blocks of the input are rotated.

    y = base(x R),    R = diag(R_1, ..., R_r),    R_i = (I - Q_i) (I + Q_i)^-1,    Q_i skew-symmetric

or, by the Neumann series of that inverse, ``R_i = I + 2 Q + 2 Q^2 + ... + Q^n`` with the sign of Q turned around. A
slot has a place of its own for R, which is of full rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.rotation import BLOCK, block_of, rotated
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

ROTATION = "oft_R"
WHOLE = "oft_r"  # before PEFT 0.16
MOST_TERMS = 100  # PEFT's default is 5


@dataclass
class OFTConfig(AdapterConfig):
    """Names and defaults of ``peft.OFTConfig``.

    Args:
        oft_block_size: how many inputs are rotated together; where it doesn't divide a site's, the nearest that does.
            r: how many blocks there are instead; one of the two is 0.
        use_cayley_neumann: R by the first ``num_cayley_neumann_terms`` of a series; ``False``: exactly.
        coft: keep each Q within ``eps / sqrt(r)``. block_share: one rotation for all blocks.
        module_dropout: accepted for PEFT's sake, which applies none.
        init_weights: start with no rotation; ``False``: at random.
        bias: ``"oft_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 0
    oft_block_size: int = BLOCK
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    peft_type: ClassVar[str] = "OFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) < 1:
            raise AdapterError(
                "r, oft_block_size: expected one of them above 0 and 0 for the other, since their product is a site's "
                f"inputs, found {self.r} and {self.oft_block_size}"
            )
        self.check_positive("num_cayley_neumann_terms", "eps")
        self.check_at_most(MOST_TERMS, "num_cayley_neumann_terms")
        self.check_probability("module_dropout")


@dataclass(frozen=True)
class OftPlan(SitePlan):
    """``size`` of each of ``blocks``. ``terms`` of the series, 0: exact. ``bound`` of Q, 0: none."""

    size: int = 1
    blocks: int = 1
    terms: int = 0
    bound: float = 0.0

    @property
    def block(self) -> int:
        return self.size


def check_rotates(what: str, site: str, kind: Kind, size: int) -> None:
    """Refuse a site whose inputs can't be rotated.

    Raises:
        AdapterError: it is no linear layer and no conv2d with a kernel of ones, or a block is one input.
    """
    if not kind.takes_rotation or len(kind.kernel) not in (0, 2):
        raise AdapterError(
            f"{site}: {what} adapts linear layers and conv2d with a kernel of 1x1 and without groups, found {kind}; "
            "leave the site out"
        )
    if size < 2:
        raise AdapterError(
            f"{site}: blocks of one of its {kind.in_features} inputs can't be rotated; leave the site out"
        )


@one_node
def turn(entries: Tensor, size: int, blocks: int, terms: int) -> Tensor:
    """Rotations less the identity, ``[blocks, size, size]``.

    Args:
        entries: those of each Q above its diagonal, ``[blocks or 1, size * (size - 1) / 2]``. terms: as in the plan.
    """
    exact = entries.to(torch.promote_types(entries.dtype, torch.float32))
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    above = exact.new_zeros(len(entries), size, size).index_put(
        (torch.arange(len(entries), device=entries.device)[:, None], rows, columns), exact
    )
    q = above - above.transpose(1, 2)
    found = cayley(q) if not terms else neumann(q, terms)
    return found.expand(blocks, size, size).to(entries)


def cayley(q: Tensor) -> Tensor:
    """``(I - Q) (I + Q)^-1 - I`` of each Q, ``[blocks, size, size]``."""
    eye = torch.eye(q.shape[1]).to(q)
    found: Tensor = torch.linalg.solve(eye + q, -2 * q, left=False)
    return found


def neumann(q: Tensor, terms: int) -> Tensor:
    """The series less the identity, whose last term counts half, as PEFT sums it."""
    if terms == 1:
        return torch.zeros_like(q)
    found, power = 2 * q, q
    if terms > 2:
        power = torch.bmm(q, q)
        found = found + 2 * power
        for _ in range(3, terms - 1):
            power = torch.bmm(power, q)
            found = found + 2 * power
        found = found + torch.bmm(power, q)
    return found


def bounded(entries: Tensor, bound: float) -> Tensor:
    """Entries of Q's whose norms are within the bound."""
    bound = bound / len(entries) ** 0.5
    lengths = 2**0.5 * entries.norm(dim=1, keepdim=True)
    return torch.where(lengths <= bound, entries, entries * (bound / lengths))


class Bounded(nn.Module):
    """Keeps a parameter within a bound: while training it is written, as in PEFT."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, entries: Tensor) -> Tensor:
        """The gradient is that of the result."""
        if not self.training:
            return entries + (bounded(entries, self.bound) - entries).detach()
        with torch.no_grad():
            entries.copy_(bounded(entries, self.bound))
        return entries

    def extra_repr(self) -> str:
        """The bound."""
        return f"bound={self.bound:g}"


def oft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    oft_R: Tensor,
    size: int,
    terms: int,
    within: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    entries = oft_R if within is None else within(oft_R)
    return base(rotated(x, turn(entries, size, kind.in_features // size, terms), kind.feature_dimension))


@functools.lru_cache(maxsize=64)
def _of(size: int, terms: int) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(oft, size=size, terms=terms)


class Oft(Method[OFTConfig]):
    """The parameter ``oft_R`` [blocks or 1, size * (size - 1) / 2]."""

    name = "oft"
    peft_type = "OFT"
    needs: ClassVar = {"oft": ("rotation",)}
    config_class = OFTConfig
    alone = "OFT adapter"  # PEFT's forward and its merge take two in different orders

    def plan(self, config: OFTConfig, site: str, kind: Kind) -> OftPlan:
        inputs = kind.in_features
        size = inputs // block_of(inputs, config.r) if config.r else block_of(inputs, config.oft_block_size)
        check_rotates("OFT", site, kind, size)
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        return OftPlan(kind, 0, 1.0, size, inputs // size, terms, config.eps if config.coft else 0.0)

    def shapes(self, config: OFTConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, OftPlan)
        return {ROTATION: (1 if config.block_share else plan.blocks, plan.size * (plan.size - 1) // 2)}

    def read(self, config: OFTConfig, tensors: dict[str, Tensor]) -> tuple[OFTConfig, dict[str, Tensor]]:
        if old := [key for key in tensors if key.endswith(f".{WHOLE}")]:
            raise CheckpointError(
                f"{old[0]}: an OFT of PEFT before 0.16 has whole matrices and, since 0.14, gains, "
                f"expected {ROTATION}, which PEFT trains since: train it anew, or merge it with the PEFT that wrote it"
            )
        return config, tensors

    def keys(self, kind: Kind) -> dict[str, str]:
        return {ROTATION: f"{ROTATION}.weight"}

    def initialise(self, config: OFTConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        nn.init.zeros_(parameters[ROTATION]) if config.init_weights else nn.init.normal_(parameters[ROTATION], std=0.1)

    def part(
        self, config: OFTConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        made = super().part(config, plan, parameters, strength=strength)
        if config.coft:
            made.within = Bounded(config.eps)
        return made

    def rewrite(self, name: str, config: OFTConfig, site: SiteAdapter) -> Rewrite:
        assert isinstance(site.plan, OftPlan)
        return Rewrite(f"oft:{name}", _of(site.plan.size, site.plan.terms), site.operands(name, (ROTATION, "within")))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, OftPlan)
        entries = parameters[ROTATION].to(torch.promote_types(parameters[ROTATION].dtype, torch.float32))
        entries = bounded(entries, plan.bound) if plan.bound else entries
        return SlotValues.without_ranks(plan.kind, rotation=turn(entries, plan.size, plan.blocks, plan.terms))

    def kept(self, config: OFTConfig, plan: SitePlan) -> Kept:
        return Kept()

    def scales(self, config: OFTConfig) -> bool:
        return False
