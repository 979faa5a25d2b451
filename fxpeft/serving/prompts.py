"""Serving soft prompts: one buffer holds the prompt, and prompts of its length come and go by a copy.

The prompt's length is a shape of the compiled graph, so it is declared and every prompt has it. Off,
no prompt at all, is another length: the model then runs its own forward, with a graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import METHODS, method_of
from fxpeft.methods.prompts import PromptLearningConfig, PromptMethod, PromptPlan
from fxpeft.model.placement import placement
from fxpeft.model.wrappers import submodule
from fxpeft.passes.live import Container, feed_module, is_bound, unbind


def prompt_methods() -> dict[str, PromptMethod[Any]]:
    """The methods that share the slot of a prompt, by name."""
    return {method.name: method for method in METHODS if isinstance(method, PromptMethod)}


class PromptSlot(Container):
    """Where the prompt of a prepared model is.

    Args:
        site: the module whose forward is fed. plan: what a prompt has to be like.
    """

    prompt: Tensor

    def __init__(self, site: str, plan: PromptPlan, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.site, self.plan = site, plan
        self.register_buffer("prompt", torch.zeros(plan.rows, plan.width, device=device, dtype=dtype), persistent=False)

    @classmethod
    def of(cls, model: nn.Module, site: str, plan: PromptPlan) -> PromptSlot:
        """A slot on the device of the site, in the dtype of its embeddings; the model is not touched."""
        host = submodule(model, site)
        device, _ = placement(host, model, autocast=False)
        weight: Tensor = submodule(host, plan.embed).weight  # type: ignore[assignment]
        return cls(site, plan, device=device, dtype=weight.dtype)


def declare(
    model: nn.Module, methods: Sequence[str], num_virtual_tokens: int | None, adapters: Sequence[Adapter]
) -> tuple[str, PromptPlan] | None:
    """Site and plan of the prompts to come; those that the model has say it too.

    Args:
        methods: ``prompt_tuning`` and ``p_tuning``, which share a slot, or ``prefix_tuning``.

    Raises:
        AdapterError: both kinds of prompt, no length, or a model that takes none.
    """
    own = [(site, plan) for a in adapters for site, plan in a.plan.sites.items() if isinstance(plan, PromptPlan)]
    known = prompt_methods()
    wanted = [m for m in methods if m in known]
    if not wanted:
        if num_virtual_tokens is not None:
            raise AdapterError(f"num_virtual_tokens: only with one of the methods {', '.join(known)}")
        return own[0] if own else None
    if "prefix_tuning" in wanted and len(wanted) > 1:
        raise AdapterError("methods: prefix_tuning fills the cache, prompts are embeddings; declare one of the two")
    if num_virtual_tokens is None and not own:
        raise AdapterError(f"{wanted[0]}: expected num_virtual_tokens, the length of the prompts to come, found None")
    if num_virtual_tokens is None:
        return own[0]
    method = known[wanted[0]]
    config: PromptLearningConfig = method.config_class(num_virtual_tokens=num_virtual_tokens)
    _, sites = method.find(model, config)
    site, plan = next(iter(sites.items()))
    assert isinstance(plan, PromptPlan)
    return site, plan


def release(model: nn.Module, slot: PromptSlot) -> None:
    """Take the slot out; the model's class is its own again."""
    host = submodule(model, slot.site)
    unbind(host)
    host._modules.pop("slot", None)


def lower(slot: PromptSlot | None, adapter: Adapter) -> list[str]:
    """Finish an adapter's prompt for the slot; returns why it doesn't fit, if so."""
    method = method_of(adapter.config)
    if not isinstance(method, PromptMethod):
        return [f"{method.name}: has no slot: {method.unlowered}"] if method.unlowered else []
    site, plan = next(iter(adapter.plan.sites.items()))
    assert isinstance(plan, PromptPlan)
    name = method.name
    if slot is None:
        return [f"{name}: has no slot; declare methods=({name!r},), num_virtual_tokens={plan.rank}"]
    own = slot.plan
    for what, found, expected in (
        ("virtual tokens", _kind(plan), _kind(own)),
        ("num_virtual_tokens", plan.rank, own.rank),
        ("shape", [plan.rows, plan.width], [own.rows, own.width]),
        ("task_type", plan.task, own.task),
    ):
        if found != expected:
            return [f"{name}: {what}: the slot was declared for {expected!r}, found {found!r}"]
    prompt = method.prompt(adapter.config, plan, adapter.values.sites[site])
    adapter.prompt = prompt.to(slot.prompt.device, slot.prompt.dtype, copy=True).contiguous()
    return []


def _kind(plan: PromptPlan) -> str:
    return "keys and values" if plan.prefix else "embeddings"


@torch.no_grad()
def show(model: nn.Module, slot: PromptSlot | None, adapters: Sequence[Adapter]) -> None:
    """Put the prompt among ``adapters`` into the slot; without one the model runs its own forward."""
    if slot is None:
        return
    host = submodule(model, slot.site)
    shown = next((a.prompt for a in adapters if a.prompt is not None), None)
    if shown is None:
        unbind(host)
        return
    slot.prompt.copy_(shown)
    if not is_bound(host):
        feed_module(host, slot.plan.feed("slot", "prompt", slot.prompt, container="slot"), name=slot.site)
