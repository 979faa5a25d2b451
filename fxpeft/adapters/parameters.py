"""Which parameters of a model are trained, and how many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxpeft.adapters.gathering import check_trained
from fxpeft.adapters.penalty import watch_loss
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError
from fxpeft.methods.adalora import AdaLoraConfig
from fxpeft.methods.base import SiteAdapter
from fxpeft.model.wrappers import submodule, unwrap


def set_requires_grad(model: nn.Module, names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train these adapters or freeze them, whether they are active or not; the others stay as they are.

    It holds until the active adapters are chosen again (:func:`fxpeft.set_adapter`, or another adapter comes), which
    trains the active ones as always; through :func:`fxpeft.disabled`, under which nothing is trained, it holds.

    Raises:
        AdapterError: no such adapter; or the model is prepared, and slots hold no parameters; or FSDP had parted the
            parameters of its modules before it came.
    """
    model, state = unwrap(model), state_of(model)
    adapters = [state.get(name) for name in ([names] if isinstance(names, str) else names)]
    if state.serving is not None:
        raise AdapterError(
            "the model serves its adapters from slots, which are not trained: call release_hotswap first, after which "
            "they have parameters again"
        )
    if requires_grad:
        check_trained(model, [replace(adapter, trained=True) for adapter in adapters])
    for adapter in adapters:
        state.note(adapter)
        adapter.trained = requires_grad
        for parameter in adapter.parameters():
            parameter.requires_grad_(requires_grad)
    watch_loss(model, state)


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float, *, weight_decay: float = 0.0, embedding_lr: float = 1e-6
) -> list[dict[str, Any]]:
    """LoRA+ (https://arxiv.org/abs/2402.12354): what is trained as groups for an optimiser, B faster than A.

    ``torch.optim.AdamW(fxpeft.lora_plus_groups(model, 1e-4, 16))``; the groups are those of PEFT's
    ``create_loraplus_optimizer``.

    Args:
        lr: of A, and of all that isn't named below.
        ratio: what ``lr`` is multiplied by for B and for vectors, such as biases and DoRA's magnitudes.
        weight_decay: of all but biases and layer norms.
        embedding_lr: of A and B at an embedding.

    Raises:
        AdapterError: nothing is trained.
    """
    model = unwrap(model)
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in _updates(module)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        rate, decay = lr, weight_decay
        if parameter in embeddings:
            rate = embedding_lr
        elif leaf == "lora_B" or parameter.ndim == 1:
            plain = "bias" in name or isinstance(submodule(model, owner), nn.LayerNorm)
            rate, decay = lr * ratio, 0.0 if plain else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise AdapterError("lora_plus_groups: no parameter is trained; add_adapter first, or set_requires_grad")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def lora_fa_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """LoRA-FA (https://arxiv.org/abs/2308.03303): freeze A, and give what PEFT's ``LoraFAOptimizer`` takes to train B.

    ``peft.optimizers.LoraFAOptimizer(fxpeft.lora_fa_groups(model, 1e-3))``. Each site has the scale that it computes
    with, patterns, rsLoRA and :func:`fxpeft.set_scale` included. What else is trained, such as ``modules_to_save``,
    DoRA's magnitudes and biases, is trained by AdamW there.

    Raises:
        AdapterError: an active adapter is no LoRA, or nothing is trained.
    """
    model, state = unwrap(model), state_of(model)
    running = [adapter for adapter in state.running() if adapter.trains]
    if not running:
        raise AdapterError("lora_fa_groups: no parameter is trained; add_adapter first, or set_requires_grad")
    if other := [
        a.name for a in running if isinstance(a.config, AdaLoraConfig) or not {"lora_A", "lora_B"} <= _names(a)
    ]:
        raise AdapterError(f"lora_fa_groups: expected LoRAs, {', '.join(other)} has no A and B; set_adapter a LoRA")
    found: list[tuple[str, nn.Parameter, float | None]] = []
    pairs: set[nn.Parameter] = set()
    for adapter in running:
        for site in adapter.values.sites:
            part = adapter.parts[site]
            assert isinstance(part, SiteAdapter)
            a, b = part.get_parameter("lora_A"), part.get_parameter("lora_B")
            a.requires_grad_(False)
            scale = adapter.plan.sites[site].scaling * adapter.strength_at(site)
            found += [(f"{len(found)}.lora_A", a, scale), (f"{len(found)}.lora_B", b, scale)]
            pairs |= {a, b}
    rest = [p for p in model.parameters() if p.requires_grad and p not in pairs]
    found += [(f"{len(found) + number}", p, None) for number, p in enumerate(rest)]
    names, params, scales = zip(*found, strict=True)
    return [{"params": list(params), "names": list(names), "scaling_factors": list(scales), "lr": lr,
             "betas": (0.9, 0.999), "weight_decay": weight_decay}]  # fmt: skip


def _names(adapter: Adapter) -> set[str]:
    """What parameters of an adapter's every site are called."""
    return set[str].intersection(*(set(parts) for parts in adapter.values.sites.values()))


def _updates(module: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices by which adapters change a module's own weight."""
    for part in module._modules.get("adapters", nn.Module()).children():  # type: ignore[union-attr]
        if isinstance(part, SiteAdapter):
            yield from (parameter for parameter in part.parameters() if parameter.ndim > 1)


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained; prints as a line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_parameters(model: nn.Module, *, show: bool = True) -> ParameterCount:
    """Count the parameters that an optimiser would train; 4-bit weights count as the weights they hold.

    Args:
        show: print the line that PEFT's ``print_trainable_parameters`` prints.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    counted = ParameterCount(trainable, total)
    if show:
        print(counted)
    return counted
