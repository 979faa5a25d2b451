"""VB-LoRA (https://arxiv.org/abs/2405.15179): every part of A and B is a mixture of few vectors of one bank.

    y = base(x) + B A dropout(x)

A's row and B's column fall into parts of ``vector_length``, and each part is the mixture of the ``topk`` vectors that
its logits are largest for. The bank is shared by all sites, and trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import check_linear
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node

OUT, LEAST = -1e4, 1e-37  # the logit of a vector that a file doesn't name, and the least weight of one that it does
BANK, LOGITS = "vblora_vector_bank", ("vblora_logits_A", "vblora_logits_B")
PICKED = ("_topk_indices", "_topk_weights")


@dataclass
class VBLoRAConfig(AdapterConfig):
    """Names and defaults of ``peft.VBLoRAConfig``.

    Args:
        r: rank. num_vectors, vector_length: size of the bank; the length divides each site's inputs and outputs.
        topk: how many vectors a part is mixed of. vblora_dropout: on the update's input while training.
        init_vector_bank_bound: the bank starts uniform within. init_logits_std: deviation of the logits at the start.
        save_only_topk_weights: write the vectors that are mixed, and their weights, and no logits. Read again, the
            others' logits are so low that they stay out of the mixture.
        bias: ``"vblora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    peft_type: ClassVar[str] = "VBLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "num_vectors", "vector_length", "topk")
        if self.topk > self.num_vectors:
            raise AdapterError(f"topk: expected at most num_vectors {self.num_vectors}, found {self.topk}")
        self.check_probability("vblora_dropout")


@dataclass(frozen=True)
class VBLoRAPlan(SitePlan):
    """``topk``: how many vectors a part is mixed of."""

    topk: int = 2


@one_node
def mixed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """``[..., vectors]`` to ``[..., vector_length]``."""
    best = logits.topk(topk, -1)
    weights = torch.softmax(best[0], -1)
    return (weights.unsqueeze(-1) * bank[best[1]]).sum(-2)


def factors(logits_a: Tensor, logits_b: Tensor, bank: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]``."""
    return mixed(logits_a, bank, topk).flatten(1), mixed(logits_b, bank, topk).transpose(1, 2).flatten(0, 1)


def vblora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    vblora_logits_A: Tensor,
    vblora_logits_B: Tensor,
    vblora_vector_bank: Tensor,
    topk: int,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph."""
    y = base(x)
    bank = vblora_vector_bank.to(vblora_logits_A)
    a, b = factors(vblora_logits_A, vblora_logits_B, bank, topk)
    h = kind.reduce(x if dropout is None else dropout(x.type_as(a)), a)
    out: Tensor = (y + kind.expand(h, b)).type_as(y)
    return out


@functools.lru_cache(maxsize=64)
def _of_topk(topk: int) -> Callable[..., Tensor]:
    """One function for one number, by which a rewritten graph is found again."""
    return functools.partial(vblora, topk=topk)


def picked(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Which vectors are mixed, and the weights of all but the last, as files hold them."""
    best = logits.topk(topk, -1)
    kinds = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}  # the least that PEFT takes
    dtype = next((kind for most, kind in kinds.items() if logits.shape[-1] < most), torch.int64)
    return best.indices.to(dtype), torch.softmax(best.values, -1)[..., :-1]


def logits_of(key: str, places: Tensor, weights: Tensor | None, vectors: int) -> Tensor:
    """Logits whose :func:`picked` is this.

    Raises:
        CheckpointError: the tensors are of other shapes, or name vectors that there are none of.
    """
    expected = None if places.ndim != 3 else [*places.shape[:-1], places.shape[-1] - 1]
    if weights is None or expected is None or list(weights.shape) != expected or not weights.is_floating_point():
        found = "none" if weights is None else f"{weights.dtype} {list(weights.shape)}"
        raise CheckpointError(f"{key}: {list(places.shape)}: expected weights beside it, {expected}, found {found}")
    if places.is_floating_point() or places.is_complex() or not bool(((places >= 0) & (places < vectors)).all()):
        raise CheckpointError(f"{key}: expected numbers of vectors below num_vectors {vectors}, found others")
    whole = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    logits = weights.new_full((*places.shape[:-1], vectors), OUT)
    return logits.scatter(-1, places.long(), whole.clamp(min=LEAST).log())


class VBLoRA(Method[VBLoRAConfig]):
    """Parameters ``vblora_logits_A`` [r, in / length, vectors] and ``vblora_logits_B`` [out / length, r, vectors]."""

    name = "vblora"
    peft_type = "VBLORA"
    config_class = VBLoRAConfig
    shared_keys: ClassVar[Mapping[str, str]] = {BANK: f"base_model.{BANK}"}

    def plan(self, config: VBLoRAConfig, site: str, kind: Kind) -> VBLoRAPlan:
        check_linear("VB-LoRA", site, kind)
        for what, size in (("inputs", kind.in_features), ("outputs", kind.out_features)):
            if size % config.vector_length:
                raise AdapterError(f"{site}: vector_length {config.vector_length} doesn't divide its {size} {what}")
        return VBLoRAPlan(kind, config.r, 1.0, config.topk)

    def shared(self, config: VBLoRAConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        return {BANK: (config.num_vectors, config.vector_length)}

    def initialise_shared(self, config: VBLoRAConfig, shared: Mapping[str, Tensor]) -> None:
        nn.init.uniform_(shared[BANK], -config.init_vector_bank_bound, config.init_vector_bank_bound)

    def shared_trained(self, config: VBLoRAConfig) -> Collection[str]:
        return (BANK,)

    def shapes(self, config: VBLoRAConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        into, out = (size // config.vector_length for size in (plan.kind.in_features, plan.kind.out_features))
        return dict(
            zip(LOGITS, ((plan.rank, into, config.num_vectors), (out, plan.rank, config.num_vectors)), strict=True)
        )

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: name for name in LOGITS}

    def initialise(self, config: VBLoRAConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        for name in LOGITS:
            nn.init.normal_(parameters[name], std=config.init_logits_std)

    def dropout(self, config: VBLoRAConfig, kind: Kind) -> float:
        return config.vblora_dropout

    def rewrite(self, name: str, config: VBLoRAConfig, site: SiteAdapter) -> Rewrite:
        bank = {f"{name}.shared.{BANK}": getattr(site.shared, BANK)}
        held = {**site.operands(name, (*LOGITS, "dropout")), **bank}
        return Rewrite(f"vblora:{name}", _of_topk(config.topk), held, shared=tuple(bank))

    def stored(
        self, config: VBLoRAConfig, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if not config.save_only_topk_weights:
            return dict(parameters)
        both = {name: picked(logits.detach(), config.topk) for name, logits in parameters.items()}
        return {f"{name}{end}": t for name, pair in both.items() for end, t in zip(PICKED, pair, strict=True)}

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        own = next(logits for logits in LOGITS if name.startswith(logits))
        return super().key(site, plan, own) + name.removeprefix(own)

    def read(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> tuple[VBLoRAConfig, dict[str, Tensor]]:
        if not config.save_only_topk_weights:
            return config, tensors
        left = dict(tensors)
        for key in [key for key in left if key.endswith(PICKED[0])]:
            own, places = key.removesuffix(PICKED[0]), left.pop(key)
            left[own] = logits_of(key, places, left.pop(own + PICKED[1], None), config.num_vectors)
        return config, left

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        assert isinstance(plan, VBLoRAPlan)
        logits_a, logits_b = (parameters[name] for name in LOGITS)
        a, b = factors(logits_a, logits_b, base.shared[BANK].to(logits_a), plan.topk)
        return SlotValues(a, b.t(), torch.ones(plan.rank))

    def scales(self, config: VBLoRAConfig) -> bool:
        return False
