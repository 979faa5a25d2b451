"""BOFT (https://arxiv.org/abs/2311.06243): the input is rotated by a product of permuted blocks, the output multiplied.

    y = s * (base(x R) - bias) + bias,    R = R_m ... R_2 R_1,    R_i = P_i diag(...) P_i^T

R is one of blocks, each ``boft_block_size * 2^(m - 1)`` inputs wide, so that OFT's place in a slot holds it. At a
convolution whose kernel is wider than one it mixes the kernel's positions with the inputs, which no rotation of the
input does: there it is an update of the weight, ``[out, in * kernel]``, of full rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import applied, full_rank
from fxpeft.methods.oft import cayley, check_rotates
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.rotation import rotated, widened
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

ROTATIONS, GAIN = "boft_R", "boft_s"


@dataclass
class BOFTConfig(AdapterConfig):
    """Names and defaults of ``peft.BOFTConfig``.

    Args:
        boft_block_size: how many inputs are rotated together. boft_block_num: how many blocks there are instead; one
            of the two is 0.
        boft_n_butterfly_factor: how many rotations follow each other, m above. PEFT takes 1 for any other number where
            it can't compile its CUDA extension.
        boft_dropout: the share of a rotation's blocks that stay as they are while training.
        init_weights: start with no rotation; ``False``: at random.
        bias: ``"boft_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "BOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.boft_block_size, self.boft_block_num
        if min(sizes) != 0 or max(sizes) < 1:
            raise AdapterError(
                "boft_block_size, boft_block_num: expected one of them above 0 and 0 for the other, since their "
                f"product is a site's inputs, found {sizes[0]} and {sizes[1]}"
            )
        self.check_positive("boft_n_butterfly_factor")
        self.check_at_most(32, "boft_n_butterfly_factor")  # a site has two to that power of blocks
        self.check_probability("boft_dropout")


@dataclass(frozen=True)
class BoftPlan(SitePlan):
    """``size`` of each of ``blocks``, and how many ``factors`` there are."""

    size: int = 1
    blocks: int = 1
    factors: int = 1

    @property
    def block(self) -> int:
        return 0 if is_wide(self.kind) else int(self.size * 2 ** (self.factors - 1))

    @property
    def alone(self) -> str:
        return "BOFT adapter" if is_wide(self.kind) else ""


def is_wide(kind: Kind) -> bool:
    """Whether a target has a kernel of more than one position."""
    return math.prod(kind.kernel) > 1


def butterfly(size: int, factors: int) -> list[list[int]]:
    """The permutations of the inputs that one block of the product takes together, each rotation's its own."""
    wide, half, found = size * 2 ** (factors - 1), size // 2, []
    for number in range(factors):
        block = size * 2**number
        steps = block // half
        order = [*range(0, steps, 2), *range(1, steps, 2)]
        within = [step * half + i for step in order for i in range(half)] if factors > 1 else list(range(block))
        found.append([start + i for start in range(0, wide, block) for i in within])
    return found


@one_node
def turns(entries: Tensor) -> Tensor:
    """Each rotation's blocks less the identity, ``[factors, blocks, size, size]``, in float32 or wider."""
    exact = entries.to(torch.promote_types(entries.dtype, torch.float32))
    return cayley((exact - exact.transpose(2, 3)).flatten(0, 1) / 2).view(exact.shape)


@one_node
def product(turned: Tensor, factors: int) -> Tensor:
    """Their product less the identity, ``[fewer blocks, wider, wider]``."""
    if factors == 1:
        return turned[0]
    size = turned.shape[2]
    eye = torch.eye(size * 2 ** (factors - 1)).to(turned)
    whole = eye.expand(turned.shape[1] * size // len(eye), -1, -1)
    for each, order in zip(turned, butterfly(size, factors), strict=True):
        whole = torch.bmm(eye + widened(each, len(eye))[:, order][:, :, order], whole)
    return whole - eye


@one_node
def change(weight: Tensor, rotation: Tensor, gain: Tensor) -> Tensor:
    """What is added to a weight ``[out, in, *kernel]`` that is rotated and whose outputs are multiplied, ``[out]``."""
    flat = weight.flatten(1)
    turned = rotated(flat, rotation.transpose(1, 2), -1)
    return (turned * gain.unsqueeze(1) - flat).view(weight.shape)


class Dropped(nn.Module):
    """Rotations less the identity of which one loses some of its blocks while training; drawn in PEFT's order."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, turned: Tensor) -> Tensor:
        """``[factors, blocks, size, size]``."""
        if not self.training:
            return turned
        factors, blocks = turned.shape[:2]
        number = torch.randint(0, factors, (1,))
        there = torch.arange(blocks)[torch.randperm(blocks)] >= int(self.share * blocks)
        there = there.unsqueeze(0) | (torch.arange(factors) != number).unsqueeze(1)
        return turned * there.to(turned).view(factors, blocks, 1, 1)

    def extra_repr(self) -> str:
        """The share."""
        return f"share={self.share}"


def boft(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    boft_R: Tensor,
    boft_s: Tensor,
    factors: int,
    bias: Tensor | None = None,
    dropped: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    turned = turns(boft_R)
    turned = turned if dropped is None else dropped(turned)
    y = base(rotated(x, product(turned, factors).type_as(boft_R), kind.feature_dimension))
    gain = boft_s.flatten()
    out = y * kind.per_output(gain)
    if bias is not None:
        out = out + kind.per_output((1 - gain) * bias)
    return out.type_as(y)


def boft_of_kernel(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    boft_R: Tensor,
    boft_s: Tensor,
    weight: Tensor,
    factors: int,
    dropped: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph at a convolution whose kernel is wider than one."""
    turned = turns(boft_R)
    turned = turned if dropped is None else dropped(turned)
    rotation = product(turned, factors).type_as(boft_R)
    return applied(kind, base, x, change(weight.detach().type_as(boft_R), rotation, boft_s.flatten()), None)


@functools.lru_cache(maxsize=64)
def _of(factors: int, wide: bool) -> Callable[..., Tensor]:
    """One function for each form, by which a rewritten graph is found again."""
    return functools.partial(boft_of_kernel if wide else boft, factors=factors)


class Boft(Method[BOFTConfig]):
    """Parameters ``boft_R`` [factors, blocks, size, size] and ``boft_s`` [out, 1], of a convolution [1, out]."""

    name = "boft"
    peft_type = "BOFT"
    needs: ClassVar = {"boft": ("rotation", "g_out", "shift")}
    config_class = BOFTConfig
    follows_base = True  # the shift is one of its bias

    def plan(self, config: BOFTConfig, site: str, kind: Kind) -> BoftPlan:
        inputs, factors = math.prod(kind.a_shape(1)), config.boft_n_butterfly_factor
        given = config.boft_block_size or config.boft_block_num
        size = config.boft_block_size or inputs // config.boft_block_num
        if not is_wide(kind):
            check_rotates("BOFT", site, kind, size)
        elif len({*kind.kernel}) > 1 or len(kind.kernel) != 2 or kind.groups > 1 or not kind.like_target:
            raise AdapterError(
                f"{site}: BOFT adapts linear layers and conv2d with a square kernel and without groups, as in PEFT, "
                f"found {kind}; leave the site out"
            )
        if inputs % given or (inputs // size) % 2 ** (factors - 1) or (factors > 1 and size % 2):
            what = f"{inputs // size} blocks of {size}" if not inputs % given else f"{given}"
            raise AdapterError(
                f"{site}: boft_block_size, boft_block_num, boft_n_butterfly_factor: expected what divides its {inputs} "
                f"inputs, into a multiple of {2 ** (factors - 1)} blocks, of an even size where there is more than one "
                f"factor, found {what}"
            )
        return BoftPlan(kind, 0, 1.0, size, inputs // size, factors)

    def shapes(self, config: BOFTConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, BoftPlan)
        out = plan.kind.out_features
        return {
            ROTATIONS: (plan.factors, plan.blocks, plan.size, plan.size),
            GAIN: (1, out) if plan.kind.kernel else (out, 1),
        }

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in (ROTATIONS, GAIN)}

    def initialise(self, config: BOFTConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        if config.init_weights:
            nn.init.zeros_(parameters[ROTATIONS])
            nn.init.ones_(parameters[GAIN])
        else:
            nn.init.normal_(parameters[ROTATIONS], std=0.1)
            nn.init.normal_(parameters[GAIN], mean=1.0, std=0.1)

    def part(
        self, config: BOFTConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        made = super().part(config, plan, parameters, strength=strength)
        if config.boft_dropout:
            made.dropped = Dropped(config.boft_dropout)
        return made

    def rewrite(self, name: str, config: BOFTConfig, site: SiteAdapter) -> Rewrite:
        held = site.operands(name, (ROTATIONS, GAIN, "dropped"))
        wide = is_wide(site.plan.kind)
        return Rewrite(
            f"boft:{name}", _of(config.boft_n_butterfly_factor, wide), held, reads=("weight" if wide else "bias",)
        )

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, BoftPlan)
        entries, gain = (
            parameters[n].to(torch.promote_types(parameters[n].dtype, torch.float32)) for n in (ROTATIONS, GAIN)
        )
        gain, bias, rotation = gain.flatten(), base.bias(), product(turns(entries), plan.factors)
        if is_wide(plan.kind):
            return full_rank(change(base.weight().to(gain), rotation, gain), 1.0)
        features = {"g_out": gain, "rotation": rotation}
        if bias is not None:
            features["shift"] = bias.to(gain) * (1 - gain)
        return SlotValues.without_ranks(plan.kind, **features)

    def read(self, config: BOFTConfig, tensors: dict[str, Tensor]) -> tuple[BOFTConfig, dict[str, Tensor]]:
        """Without its CUDA extension PEFT trains one factor, whatever the config says; before 0.14 it wrote P too."""
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".boft_P")}
        found = {len(tensor) for key, tensor in tensors.items() if key.endswith(f".{ROTATIONS}") and tensor.ndim}
        return (config.changed(boft_n_butterfly_factor=1) if found == {1} else config), tensors

    def kept(self, config: BOFTConfig, plan: SitePlan) -> Kept:
        return Kept() if is_wide(plan.kind) else Kept(outputs=plan.kind.out_features)

    def flops(self, config: BOFTConfig, plan: SitePlan) -> int | None:
        return 2 * plan.kind.out_features * math.prod(plan.kind.a_shape(1)) if is_wide(plan.kind) else None

    def scales(self, config: BOFTConfig) -> bool:
        return False
