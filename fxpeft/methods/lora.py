"""LoRA (https://arxiv.org/abs/2106.09685), with PEFT's options.

    y = base(x) + scale * B A dropout(x),    scale = alpha / r, or alpha / sqrt(r) with rsLoRA

A start that is a part of the base's weight (:mod:`fxpeft.methods.inits`) is taken off again, and
with it ``y`` starts as the base's:

    y = base(x) + scale * (B A dropout(x) - B0 A0 x)
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, short
from fxpeft.methods import inits
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.blocks import BdLoraConfig
from fxpeft.methods.config import AdapterConfig, RankConfig
from fxpeft.methods.data_starts import NAMES as DATA_STARTS
from fxpeft.methods.data_starts import CordaConfig, LoraGAConfig
from fxpeft.methods.inits import EvaConfig, LoftQConfig
from fxpeft.methods.start_configs import loaded_start, read_starts, sub_config
from fxpeft.methods.tokens import check_tokens
from fxpeft.model.replication import check_ranges
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live.parameters import scaled
from fxpeft.passes.live.split import split_product
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.parted import parted_lora
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.operations import ParameterKind
from fxpeft.passes.targets.terms import Pattern

L = TypeVar("L", bound="LoraConfig")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # which don't look at the base


@dataclass
class LoraConfig(RankConfig):
    """LoRA's config: names and defaults of ``peft.LoraConfig``.

    Args:
        lora_dropout: on the update's input while training; not on embeddings (PEFT's rule).
        bias: ``"none"``; ``"lora_only"``: the sites' biases are trained with the adapter;
            ``"all"``: every bias of the model. Unlike PEFT the base's own biases stay untouched.
        init_lora_weights: ``True``: A uniform (Kaiming), B zero; ``"gaussian"``: A normal with
            deviation 1/r, B zero; ``False``: both random; ``"orthogonal"``; ``"pissa"``,
            ``"pissa_niter_N"``, ``"olora"``: principal parts of the weight, which the base keeps;
            ``"loftq"``: beside a quantised weight of the adapter's own; ``"mica"``: B, which isn't trained, has the
            weight's least directions; ``"eva"``, ``"corda"``, ``"lora_ga"``: see :func:`fxpeft.initialize_eva`,
            :func:`fxpeft.initialize_corda`, :func:`fxpeft.initialize_lora_ga`. Embeddings: A zero, B normal.
        loftq_config: a :class:`~fxpeft.LoftQConfig` or a dict; kept as a dict, as in PEFT.
        eva_config, corda_config, lora_ga_config: an :class:`~fxpeft.EvaConfig`, :class:`~fxpeft.CordaConfig`,
            :class:`~fxpeft.LoraGAConfig` or a dict.
        lora_bias: B has a bias of its own.
        use_dora: train magnitude and direction apart; see :mod:`fxpeft.methods.dora`.
        target_parameters: parameters that are no weight of a module of their own, such as the experts of a mixture
            held as one: names or dotted suffixes as in PEFT; also one regular expression for the whole name,
            or a pattern. See :mod:`fxpeft.targets.parameters`.
        fan_in_fan_out: accepted for PEFT's sake; the layout of a weight is read off the graph.
        trainable_token_indices: tokens whose rows of the input embeddings are trained too; or module -> its tokens.
            A head that has the embeddings' weight follows them. See :mod:`fxpeft.methods.tokens`.
        ensure_weight_tying: what has one weight with the input embeddings follows them: refuse other tokens there, and
            adapt, or bring whole, both alike; see :mod:`fxpeft.targets.tying`.
        use_bdlora: a :class:`~fxpeft.BdLoraConfig` or a dict: A or B is block-diagonal.
        layer_replication: the model's layers are repeated so; see :func:`fxpeft.replicate_layers`.
        alora_invocation_tokens: act from the last occurrence of these tokens in a row on; see
            :mod:`fxpeft.methods.alora`.
    """

    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_dora: bool = False
    target_parameters: str | Pattern | Collection[str] | None = None
    fan_in_fan_out: bool = False
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[Any] | None = None
    use_bdlora: BdLoraConfig | None = None

    peft_type: ClassVar[str] = "LORA"
    selecting: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "target_parameters")
    unsupported: ClassVar[Mapping[str, Any]] = {
        "arrow_config": None, "kasa_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16,
        "use_qalora": False, "velora_config": None,
    }  # fmt: skip

    reasons: ClassVar[Mapping[str, str]] = {
        "arrow_config": "a router mixes adapters by the input",
        "kasa_config": "the base's own weight is cut to a lower rank",
        "megatron_config": "Megatron's parallel layers are no targets; tensor parallelism of torch is",
        "monteclora_config": "its factors are drawn at random in every forward",
        "use_qalora": "PEFT has it for layers of GPTQ alone, which are no targets here",
        "velora_config": "what its backward keeps is compressed, which this library does another way",
    }  # fmt: skip
    #: PEFT 0.17 and 0.18 read A and B of a stack ``[experts, out, in]`` the other way round
    since: ClassVar[Mapping[str, str]] = {
        "target_parameters": "0.19.0", "trainable_token_indices": "0.17.0", "ensure_weight_tying": "0.18.0",
        "alora_invocation_tokens": "0.18.0", "layer_replication": "0.17.0", "corda_config": "0.17.0",
        "lora_ga_config": "0.19.0", "use_bdlora": "0.19.0",
    }  # fmt: skip

    @classmethod
    def from_dict(
        cls: type[L], values: Mapping[str, Any], source: str = "config", *, loading: bool = False, strict: bool = True
    ) -> L:
        given = loaded_start(values, source) if loading else values
        return super().from_dict(given, source, loading=loading, strict=strict)

    def __post_init__(self) -> None:
        read_starts(self)
        if isinstance(self.use_bdlora, dict):
            self.use_bdlora = sub_config(BdLoraConfig, self.use_bdlora, "use_bdlora")
        super().__post_init__()
        self.check_lora()

    def check_lora(self) -> None:
        """Check LoRA's own fields."""
        self.check_probability("lora_dropout")
        inits.check_name(self.init_lora_weights)
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise AdapterError("lora_bias=True needs init_lora_weights True or False, as in PEFT")
        if self.init_lora_weights == "mica" and self.use_dora:
            raise AdapterError("init_lora_weights='mica' is not supported with use_dora=True, as in PEFT")
        if self.lora_bias and self.use_dora:
            raise AdapterError("lora_bias=True is not supported with use_dora=True, as in PEFT")
        if self.layer_replication is not None:
            self.layer_replication = check_ranges(self.layer_replication)
        if self.use_bdlora is not None:
            self.check_plain("use_bdlora", alora_invocation_tokens=(None,), init_lora_weights=(True, False))
        if self.alora_invocation_tokens is not None:
            self.check_invocation(self.alora_invocation_tokens)
        if self.target_parameters:
            self.check_parameters()
        indices = self.trainable_token_indices
        if isinstance(indices, dict) and not indices:
            raise AdapterError("trainable_token_indices: expected module -> its tokens, found none; None for no tokens")
        if indices is not None:
            named = indices.items() if isinstance(indices, dict) else (("", indices),)
            for key, tokens in named:
                check_tokens(f"trainable_token_indices{f'[{short(key)}]' if key else ''}", tokens)

    def check_invocation(self, tokens: list[int]) -> None:
        """Refuse what an update that acts on some tokens can't have."""
        if not tokens or min(tokens) < 0:
            raise AdapterError(f"alora_invocation_tokens: expected tokens, at least one, found {short(tokens)}")
        self.check_plain("alora_invocation_tokens", init_lora_weights=PLAIN_STARTS)

    def check_plain(self, name: str, **plain: tuple[Any, ...]) -> None:
        """Refuse fields that can't be with another one."""
        plain |= {"use_dora": (False,), "lora_bias": (False,)}
        found = [f"{field}={value!r}" for field, own in plain.items() if (value := getattr(self, field)) not in own]
        found += ["target_parameters"] if self.target_parameters else []
        if found:
            raise AdapterError(f"{name}: {', '.join(found)} can't be with it, as in PEFT; leave it at its default")

    def check_parameters(self) -> None:
        """Refuse what the update of a parameter can't have, since it is added to the weight whatever the input."""
        wrong = {name: getattr(self, name) for name in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora")}
        start = self.init_lora_weights
        wrong["init_lora_weights"] = None if start in (True, False, "gaussian") else start
        found = [f"{name}={value!r}" for name, value in wrong.items() if value]
        if found:
            raise AdapterError(
                f"target_parameters: the update of a parameter can't have {', '.join(found)}, as in PEFT; leave it at "
                "its default (init_lora_weights: True, False or 'gaussian'), or give modules an adapter of their own"
            )


def lora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    lora_B_bias: Tensor | None = None,
    lora_A0: Tensor | None = None,
    lora_B0: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The training subgraph, rounded once to the base's dtype. The scale is applied where it is smallest."""
    y = base(x)
    update = kind.update(x if dropout is None else dropout(x.type_as(lora_A)), lora_A, lora_B, scaling)
    update = rest(kind, update, x, lora_A0, lora_B0, scaling)
    if lora_B_bias is not None:
        update = update + kind.per_output(lora_B_bias * scaling)
    out: Tensor = (y + update).type_as(y)
    return out


def rest(kind: Kind, y: Tensor, x: Tensor, lora_A0: Tensor | None, lora_B0: Tensor | None, scaling: Tensor) -> Tensor:
    """``y`` without the update that the adapter started from; it is a part of the base, which has no dropout."""
    if lora_A0 is None or lora_B0 is None:
        return y
    return y - kind.update(x, lora_A0, lora_B0, scaling)


def lora_weight(kind: ParameterKind, weight: Tensor, *, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
    """The training subgraph of a parameter: ``weight + scale * B A``, expert by expert, and not added up for a stack.

    ``lora_A``: [rank * experts, in], ``lora_B``: [out, rank * experts], as PEFT's ``ParamWrapper`` holds them.
    """
    a, rows = kind.ranks(scaled(lora_A, scaling)), kind.rows(lora_B)
    if kind.experts is None:
        return kind.updated(weight, a, rows)
    split: Tensor = split_product(weight, *kind.factors(a, rows))
    return split


class Lora(Method[LoraConfig]):
    """Parameters ``lora_A``, ``lora_B`` and, with ``lora_bias``, ``lora_B_bias``.

    Where they start from a part of the base's weight, ``lora_A0`` and ``lora_B0`` are the start.
    """

    name = "lora"
    peft_type = "LORA"
    needs: ClassVar = {"lora": (), "lora_bias": ("shift",)}
    config_class: type[LoraConfig] = LoraConfig

    def declared(self, config: LoraConfig) -> str:
        return "lora_bias" if config.lora_bias else self.name

    def plan(self, config: LoraConfig, site: str, kind: Kind) -> SitePlan:
        rank = pattern_value(config.rank_pattern, site, config.r)
        alpha = pattern_value(config.alpha_pattern, site, config.lora_alpha, "alpha_pattern")
        why = kind.check_rank(rank)
        if why:
            raise AdapterError(f"{site}: {why}; change r or rank_pattern, or leave the site out")
        inits.check_site(config.init_lora_weights, site, kind, rank)
        if config.lora_bias and not kind.takes_bias:
            raise AdapterError(f"{site}: lora_bias=True is not supported on {kind.name}; leave the site out")
        return SitePlan(kind, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def shapes(self, config: LoraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shapes = {"lora_A": plan.kind.a_shape(plan.rank), "lora_B": plan.kind.b_shape(plan.rank)}
        if config.lora_bias:
            shapes["lora_B_bias"] = (plan.kind.out_features,)
        if self.frozen(config) and plan.kind.is_linear:
            shapes |= {"lora_A0": shapes["lora_A"], "lora_B0": shapes["lora_B"]}
        return shapes

    def keys(self, kind: Kind) -> dict[str, str]:
        if kind.looks_up:
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}

    def initialise(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        a, b = parameters["lora_A"], parameters["lora_B"]
        mode = config.init_lora_weights
        if mode == "mica":
            a.zero_()
            b.copy_(inits.minor(_whole(base), plan.rank))
            return
        if plan.kind.looks_up:
            nn.init.normal_(a) if mode is False else nn.init.zeros_(a)
            nn.init.normal_(b)
            return
        if inits.starts_from_base(mode):
            values: Sequence[Tensor] = inits.first_factors(mode, _whole(base), plan.rank, plan.scaling)
            for name, value in zip(("lora_A", "lora_B", "lora_A0", "lora_B0"), (*values, *values), strict=True):
                parameters[name].copy_(value)
            return
        if mode == "loftq":
            loftq = LoftQConfig(**config.loftq_config)
            weight, *values = inits.loftq(_whole(base), plan.rank, loftq.loftq_bits, loftq.loftq_iter)
            base.set_weight(weight)
        elif mode == "orthogonal":
            values = inits.orthogonal(plan.rank, plan.kind.in_features, plan.kind.out_features)
        if mode in ("loftq", "orthogonal"):
            a.copy_(values[0])
            b.copy_(values[1])
            return
        if mode == "gaussian":
            nn.init.normal_(a, std=1 / plan.rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if mode is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)
        for name in self.frozen(config):  # until data were seen
            parameters[name].zero_()
        if "lora_B_bias" in parameters:
            bound = 1 / math.sqrt(plan.rank) if mode is False else 0.0
            nn.init.uniform_(parameters["lora_B_bias"], -bound, bound)

    def frozen(self, config: LoraConfig) -> Collection[str]:
        return ("lora_A0", "lora_B0") if inits.has_start(config.init_lora_weights) else ()

    def untrained(self, config: LoraConfig) -> Collection[str]:
        return ("lora_B",) if config.init_lora_weights == "mica" else ()

    def brings_weight(self, config: LoraConfig) -> bool:
        return config.init_lora_weights == "loftq"

    def restore(self, config: LoraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """As PEFT when it loads: the base's weight is decomposed again.

        The random start of ``pissa_niter_N`` is gone; the exact decomposition is the nearest to any.
        """
        if config.init_lora_weights in DATA_STARTS:
            for name in parameters.keys() & self.frozen(config):
                parameters[name].zero_()
        elif self.brings_weight(config) or "lora_A0" in parameters:
            mode = config.init_lora_weights
            if inits.iterations(mode):
                warnings.warn(
                    f"{mode} starts at random, and the file doesn't hold the start: what the adapter computes is near "
                    "to what was trained, in PEFT too. Convert it where it was trained: save_adapter(..., plain=True)",
                    stacklevel=2,
                )
                mode = "pissa"
            fresh = {n: torch.empty_like(p, dtype=torch.float32) for n, p in parameters.items()}
            Lora.initialise(self, replace(config, init_lora_weights=mode), plan, fresh, base)
            for name in parameters.keys() & self.frozen(config):
                parameters[name].copy_(fresh[name])

    def dropout(self, config: LoraConfig, kind: Kind) -> float:
        return 0.0 if kind.looks_up else config.lora_dropout

    def rewrite(self, name: str, config: LoraConfig, site: SiteAdapter) -> Rewrite:
        operands = ("lora_A", "lora_B", "scaling", "lora_B_bias", "lora_A0", "lora_B0", "dropout")
        kind = site.plan.kind
        if site.parted:
            held = site.operands(name, ("lora_A", "lora_B", "scaling"))
            return Rewrite(f"lora:{name}", parted_lora, held, reads=("weight",))
        leaf = kind.leaf if kind.updates_weight else ""
        held = site.operands(join(name, leaf), operands)
        return Rewrite(f"lora:{name}", lora_weight if kind.updates_weight else lora, held)

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b, bias = (parameters.get(name) for name in ("lora_A", "lora_B", "lora_B_bias"))
        assert a is not None
        assert b is not None
        shift = None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32)) * plan.scaling
        a0, b0 = parameters.get("lora_A0"), parameters.get("lora_B0")
        if a0 is not None and b0 is not None:
            a, b = torch.cat((a, a0.to(a))), torch.cat((b, -b0.to(b)), 1)
        a = plan.kind.ranks(a)
        return SlotValues(a, plan.kind.rows(b), _scales(len(a), plan.scaling), shift=shift)

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        r = plan.rank
        kept = {"lora_A": plan.kind.unranks(lowered.a[:r]), "lora_B": plan.kind.unrows(lowered.b[:r], r)}
        return kept | {name: value.detach().clone() for name, value in parameters.items() if name not in kept}


def why_not_parted(method: Method[Any], config: AdapterConfig) -> str | None:
    """Why an adapter can't be at a module that tensor parallelism has parted, or ``None``: it is a plain LoRA."""
    if type(method) is not Lora:
        return f"{method.name} can't be parted with it"
    plain = {"lora_dropout": (0,), "lora_bias": (False,), "bias": ("none",), "init_lora_weights": PLAIN_STARTS}
    found = [f"{name}={value!r}" for name, own in plain.items() if (value := getattr(config, name)) not in own]
    return f"{', '.join(found)} can't be parted with it" if found else None


def _whole(base: Base) -> Tensor:
    weight = base.weight()
    if weight.is_meta:
        raise PassError("it is on the meta device or offloaded; load it onto a device first")
    if not torch.isfinite(weight).all():
        raise PassError("it holds NaN or infinity")
    return weight


@functools.lru_cache(maxsize=1024)
def _scales(rank: int, scaling: float) -> Tensor:
    """One scale per rank; shared, never written."""
    return torch.full((rank,), scaling, dtype=torch.float32)
