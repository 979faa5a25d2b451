"""Fresh adapters whose factors start from data: CorDA and LoRA-GA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.contexts import disabled
from fxpeft.adapters.starting import asking, in_mode
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.base import Base
from fxpeft.methods.data_starts import CordaConfig, LoraGAConfig, corda, lora_ga
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.base import attribute
from fxpeft.passes.live import base_weight


def initialize_corda(model: nn.Module, run_model: Callable[[], Any], name: str = "default") -> None:
    """Give a fresh adapter with ``init_lora_weights="corda"`` its factors, by the covariance of what its sites see.

    The base's weights stay; the adapter keeps its start and takes it off. Embeddings stay as they are.

    Args:
        run_model: calls the model on the data; without gradients, in evaluation mode, the adapters switched off.

    Raises:
        AdapterError: not such an adapter, slots are prepared, or a site that saw nothing, or NaN; nothing was changed.
    """
    model = unwrap(model)
    adapter, config = _fresh(model, name, "corda")
    own = config.corda_config or CordaConfig()
    seen: dict[str, Tensor] = {}
    counts = Counter[str]()

    def gather(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            rows = args[0].detach().flatten(0, -2)
            rows = rows if own.use_float16_for_covariance else rows.float()
            rows = rows / rows.max().abs()
            seen[site] = seen.get(site, 0) + rows.t() @ rows
            counts[site] += 1

        return hook

    sites = [site for site, plan in adapter.plan.sites.items() if plan.kind.is_linear]
    handles = [submodule(model, site).register_forward_pre_hook(gather(site)) for site in sites]
    try:
        with torch.no_grad(), disabled(model), in_mode(model, training=False):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    covariances = {site: (matrix / counts[site]).float() for site, matrix in seen.items()}
    _start(
        model, adapter, sites, covariances, lambda w, c, plan: corda(w, c, plan.rank, plan.scaling, own.corda_method)
    )


def initialize_lora_ga(model: nn.Module, train_step: Callable[[], Any], name: str = "default") -> None:
    """Give a fresh adapter with ``init_lora_weights="lora_ga"`` its factors, by gradients of its sites' weights.

    The base's weights stay; the adapter keeps its start and takes it off. Embeddings stay as they are.

    Args:
        train_step: calls the model and ``backward``, once or more; in training mode, the adapters switched off.

    Raises:
        AdapterError: not such an adapter, slots are prepared, or a site whose weight got no gradient, or NaN; nothing
            was changed.
    """
    model = unwrap(model)
    adapter, config = _fresh(model, name, "lora_ga")
    own, counts = config.lora_ga_config or LoraGAConfig(), Counter[str]()
    sites = [site for site, plan in adapter.plan.sites.items() if plan.kind.is_linear]
    weights = {site: attribute(submodule(model, site), "weight") for site in sites}
    if quantised := [site for site, weight in weights.items() if not weight.is_floating_point()]:
        raise AdapterError(f"lora_ga needs gradients of weights, and these are quantised:\n{listing(quantised)}")
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = [submodule(model, s).register_full_backward_hook(lambda *_, s=s: counts.update([s])) for s in sites]
    try:
        with disabled(model), in_mode(model, training=True), torch.inference_mode(False), torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
                weight.grad = None
            train_step()
        got = {site: weight.grad for site, weight in weights.items() if weight.grad is not None}
        found = {site: grad.detach() / max(counts[site], 1) for site, grad in got.items()}
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained, grad in before:
            parameter.requires_grad_(trained)
            parameter.grad = grad
    views = {site: _as_stored(model, site, grad) for site, grad in found.items()}
    _start(model, adapter, sites, views, lambda w, g, plan: lora_ga(w, g, plan.rank, plan.scaling, own))


def _fresh(model: nn.Module, name: str, start: str) -> tuple[Adapter, LoraConfig]:
    state = state_of(model)
    found = asking(state, name, start)
    if state.serving is not None:
        raise AdapterError(f"{start} is a start of what is trained: call release_hotswap(model) before it")
    return found


def _as_stored(model: nn.Module, site: str, grad: Tensor) -> Tensor:
    """A gradient ``[out, in]`` in float32, whichever way the weight is stored."""
    module = submodule(model, site)
    flipped = base_weight(module).stride() != attribute(module, "weight").stride()
    return (grad.t() if flipped else grad).float()


def _start(
    model: nn.Module, adapter: Adapter, sites: list[str], data: Mapping[str, Tensor],
    factors: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    """Work all factors out, then write them."""
    problems = [f"{site}: it was not called, or got nothing" for site in sites if site not in data]
    problems += [f"{site}: NaN or infinity" for site, found in data.items() if not bool(found.isfinite().all())]
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites if not problems else ():
        try:
            made[site] = factors(Base(model, path=site).weight(), data[site], adapter.plan.sites[site])
        except AdapterError as error:
            problems.append(f"{site}: {error}")
    if problems:
        raise AdapterError(f"adapter {adapter.name!r} can't start from these data:\n{listing(problems)}")
    with torch.no_grad():
        for site, values in made.items():
            for name, value in zip(("lora_A", "lora_B", "lora_A0", "lora_B0"), (*values, *values), strict=True):
                attribute(adapter.parts[site], name).copy_(value)
