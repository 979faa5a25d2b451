"""A method of one's own, complete: config, parameters, training mathematics, slot values, checkpoint keys.

    python examples/own_method.py

VeRA (https://arxiv.org/abs/2310.11454), whose frozen random factors A and B all sites share, cut to each site's size:

    y = base(x) + b * (B (d * (A x)))

with only the vectors b and d trained. It lowers to a LoRA whose B carries b, so it is served, swapped and
folded like any other method, in the same compiled graph.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import fxpeft
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.targets.kinds import Kind


@dataclass
class OwnConfig(AdapterConfig):
    r: int = 64
    seed: int = 0  # of the frozen factors, so that no file has to hold them

    peft_type: ClassVar[str] = "OWN_VERA"


def own(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, d: Tensor, b: Tensor, A: Tensor, B: Tensor
) -> Tensor:
    y = base(x)
    h = kind.scale(kind.reduce(x, A[:, : kind.in_features]), d)
    out: Tensor = (y + kind.expand(h, B[: kind.out_features]) * b).type_as(y)
    return out


class Own(Method[OwnConfig]):
    name = "own"
    peft_type = "OWN_VERA"
    config_class = OwnConfig
    shared_keys: ClassVar[Mapping[str, str]] = {"A": "base_model.own_A", "B": "base_model.own_B"}

    def plan(self, config: OwnConfig, site: str, kind: Kind) -> SitePlan:
        if kind.name != "linear":
            raise fxpeft.AdapterError(f"{site}: expected a linear layer, found {kind.name}; leave the site out")
        return SitePlan(kind, config.r, 1.0)

    def shared(self, config: OwnConfig, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        kinds = [plan.kind for plan in plans.values()]
        return {
            "A": (config.r, max(kind.in_features for kind in kinds)),
            "B": (max(kind.out_features for kind in kinds), config.r),
        }

    def initialise_shared(self, config: OwnConfig, shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        for tensor in shared.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[1]))

    def shared_stored(self, config: OwnConfig) -> Collection[str]:
        return ()  # the seed gives them

    def shapes(self, config: OwnConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return {"d": (plan.rank,), "b": (plan.kind.out_features,)}

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"d": "own_d", "b": "own_b"}

    def initialise(self, config: OwnConfig, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        nn.init.constant_(parameters["d"], 0.1)
        nn.init.zeros_(parameters["b"])

    def rewrite(self, name: str, config: OwnConfig, site: SiteAdapter) -> Rewrite:
        held = {f"{name}.{key}": getattr(site, key) for key in ("d", "b")}
        shared = {f"{name}.shared.{key}": getattr(site.shared, key) for key in ("A", "B")}
        return Rewrite(f"own:{name}", own, {**held, **shared}, shared=tuple(shared))

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        a, b = base.shared["A"][:, : plan.kind.in_features], base.shared["B"][: plan.kind.out_features]
        return SlotValues(a, (b * parameters["b"].unsqueeze(1)).t(), parameters["d"].float())

    def scales(self, config: OwnConfig) -> bool:
        return False  # its graph doesn't read the site's scaling


def main() -> None:
    fxpeft.register(Own())
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))  # noqa: E731
    base, x = make(), torch.randn(64, 16)
    wanted = make()(x).detach()

    model = nn.Sequential(*base)
    fxpeft.add_adapter(model, OwnConfig(r=24, target_modules=["0", "2"]))
    fxpeft.trainable_parameters(model)
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for step in range(101):
        loss = (model(x) - wanted).square().mean()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained = model(x)
        fxpeft.save_adapter(model, folder)
        fxpeft.remove(model)
        fxpeft.prepare_hotswap(model, max_rank=32, targets=["0", "2"], methods=("lora", "own"))
        fxpeft.load_adapter(model, folder, "trained")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            print(f"in a slot: {(compiled(x) - trained).abs().max().item():.1e} away")
            fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["0"]), "other")  # a LoRA in the same graph
            compiled(x)
            fxpeft.set_adapter(model, "trained")
            print(f"and back:  {(compiled(x) - trained).abs().max().item():.1e} away")


if __name__ == "__main__":
    main()
