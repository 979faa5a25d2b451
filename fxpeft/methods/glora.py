"""GLoRA (https://arxiv.org/abs/2306.07967): the weight and the bias are scaled and shifted, each by a path of its own.

    y = (W + W * A + B) x + b + b * D + E + W C

where each of A to E is a product of two factors, a vector, one number or nothing; the last three are where the base has
a bias. Of full rank: a slot takes as many ranks as the weight's smaller side, and a shift.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.base import Base, Kept, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lycoris import exact, full_rank
from fxpeft.methods.parts import check_linear
from fxpeft.model.wrappers import submodule
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind

PATHS = tuple("ABCDE")
NAMES = tuple(f"glora_{path}_{part}" for path in PATHS for part in ("Xd", "Xu", "X"))
ZEROS = tuple(f"glora_{path}_zeros" for path in PATHS)  # what PEFT writes for a path that there is none of


@dataclass
class GloraConfig(AdapterConfig):
    """Names and defaults of ``peft.GloraConfig``.

    Args:
        r: rank of what is ``"lora"``.
        config_A_B: A and B: ``"lora"``, ``"vector"`` (a number for each output), ``"constant"`` or ``"none"``.
        config_C: ``"lora"``, ``"vector"`` or ``"none"``.
        config_D_E: D and E: ``"vector"``, ``"constant"`` or ``"none"``.
        init_weights: start with nothing changed; ``False``: at random.
        bias: ``"glora_only"`` or ``"all"``, as in :class:`~fxpeft.LoraConfig`.
    """

    r: int = 8
    bias: Literal["none", "all", "glora_only"] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True
    exclude_modules: None = field(default=None, init=False)  # no fields of PEFT's GLoRA
    layers_to_transform: None = field(default=None, init=False)
    layers_pattern: None = field(default=None, init=False)

    peft_type: ClassVar[str] = "GLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r")


@dataclass(frozen=True)
class GloraPlan(SitePlan):
    """``biased``: whether the base has a bias there."""

    biased: bool = True


def glora(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    **paths: Tensor,
) -> Tensor:
    """The training subgraph; ``paths``: those of ``NAMES`` that there are."""
    y = out = base(x)
    delta, shift = updates(weight.detach(), bias, paths)
    out = out if delta is None else out + kind.apply(x.type_as(delta), delta)
    out = out if shift is None else out + shift
    return out.type_as(y)


def updates(weight: Tensor, bias: Tensor | None, paths: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the weight ``[out, in]``, and to the bias, where something is."""
    own = {path: _value(paths, path) for path in PATHS}
    delta = None if own["A"] is None or own["B"] is None else weight.type_as(own["A"]) * own["A"] + own["B"]
    shifts = [] if own["C"] is None else [(weight.type_as(own["C"]) @ own["C"]).squeeze(-1)]
    if own["D"] is not None and own["E"] is not None and bias is not None:
        shifts.append(bias.type_as(own["D"]) * own["D"] + own["E"])
    return delta, functools.reduce(operator.add, shifts) if shifts else None


def _value(paths: Mapping[str, Tensor], path: str) -> Tensor | None:
    down = paths.get(f"glora_{path}_Xd")
    return paths.get(f"glora_{path}_X") if down is None else down @ paths[f"glora_{path}_Xu"]


class Glora(Method[GloraConfig]):
    """For each path ``glora_A_Xd`` and ``glora_A_Xu``, or ``glora_A_X``, as PEFT has them."""

    name = "glora"
    peft_type = "GLORA"
    needs: ClassVar = {"glora": ("shift",)}
    config_class = GloraConfig
    follows_base = True

    def plan(self, config: GloraConfig, site: str, kind: Kind) -> GloraPlan:
        check_linear("GLoRA", site, kind)
        return GloraPlan(kind, config.r, 1.0)

    def arranged(self, config: GloraConfig, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        biased = {site: getattr(submodule(model, site), "bias", None) is not None for site in plans}
        made = {site: GloraPlan(plan.kind, plan.rank, 1.0, biased=biased[site]) for site, plan in plans.items()}
        if empty := [site for site, plan in made.items() if not self.shapes(config, plan)]:
            raise AdapterError(f"{empty[0]}: config_A_B: expected a path here, where there is no bias, found 'none'")
        return dict(made)

    def shapes(self, config: GloraConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, GloraPlan)
        r, into, out = plan.rank, plan.kind.in_features, plan.kind.out_features
        forms: list[tuple[str, str, int, int]] = [(path, config.config_A_B, out, into) for path in "AB"]
        shapes: dict[str, tuple[int, ...]] = {}
        for path, form, rows, columns in [*forms, *([("C", config.config_C, into, 1)] if plan.biased else [])]:
            if form == "lora":
                shapes |= {f"glora_{path}_Xd": (rows, r), f"glora_{path}_Xu": (r, columns)}
            elif form != "none":
                shapes[f"glora_{path}_X"] = (rows, 1) if form == "vector" else (1,)
        if plan.biased and config.config_D_E != "none":
            size = out if config.config_D_E == "vector" else 1
            shapes |= {"glora_D_X": (size,), "glora_E_X": (size,)}
        return shapes

    def keys(self, kind: Kind) -> dict[str, str]:
        return {name: f"{name[:7]}.{name[8:]}" for name in (*NAMES, *ZEROS)}

    def initialise(self, config: GloraConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        for name, value in parameters.items():
            if config.init_weights and not name.endswith("Xu"):
                nn.init.zeros_(value)
            elif value.numel() == 1 and name.endswith("_X"):
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.kaiming_uniform_(value.unsqueeze(0) if value.ndim == 1 else value, a=math.sqrt(5))

    def read(self, config: GloraConfig, tensors: dict[str, Tensor]) -> tuple[GloraConfig, dict[str, Tensor]]:
        zeros = [key for key in tensors if key.endswith(tuple(f".glora_{path}.zeros" for path in PATHS))]
        if wrong := [key for key in zeros if bool(tensors[key].any())]:
            raise CheckpointError(f"{wrong[0]}: expected zeros, since its config says that there is none, found others")
        return config, {key: tensor for key, tensor in tensors.items() if key not in zeros}

    def rewrite(self, name: str, config: GloraConfig, site: SiteAdapter) -> Rewrite:
        return Rewrite(f"glora:{name}", glora, site.operands(name, NAMES), reads=("weight", "bias"))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        own = exact(parameters)
        like = next(iter(own.values()))
        bias = base.bias()
        delta, shift = updates(base.weight().to(like), None if bias is None else bias.to(like), own)
        if delta is None:
            assert shift is not None  # else it were refused
            return SlotValues.without_ranks(plan.kind, shift=shift)
        return full_rank(delta, 1.0)._replace(shift=shift)

    def kept(self, config: GloraConfig, plan: SitePlan) -> Kept:
        return Kept()

    def scales(self, config: GloraConfig) -> bool:
        return False
