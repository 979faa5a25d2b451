"""Serving soft prompts: one buffer holds the prompt, and prompts of its length come and go by a copy.

The prompt's length is a shape of the compiled graph, so it is declared and every prompt has it. Off,
no prompt at all, is another length: the model then runs its own forward, with a graph of its own.
With lanes each of them has room for a prompt, and each row of a batch its own lane's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError
from fxpeft.methods import METHODS, method_of
from fxpeft.methods.prompts import PromptLearningConfig, PromptMethod, PromptPlan, forward_arguments
from fxpeft.methods.row_prompts import Prompt, RowPrompts, TokenPrompts
from fxpeft.model.placement import placement
from fxpeft.model.wrappers import submodule
from fxpeft.passes.live import Container, feed_module, is_bound, unbind
from fxpeft.passes.slots.lanes import Lanes, owners


def prompt_methods() -> dict[str, PromptMethod[Any]]:
    """The methods that share the slot of a prompt, by name."""
    return {method.name: method for method in METHODS if isinstance(method, PromptMethod)}


class PromptSlot(Container):
    """Where the prompt of a prepared model is.

    Args:
        site: the module whose forward is fed. plan: what a prompt has to be like.
        lanes: of a model whose rows may have adapters of their own: each lane has room for a prompt, ``lane_prompts``
            ``[lanes + 1, rows, width]``, of which the last one stays zero; ``brings`` ``[lanes]`` says which have one.
        alone: why a row without a prompt can't be in a batch with rows that have one; empty: it can.

    ``on``: with lanes, whether calls that name no rows have the prompt.
    """

    prompt: Tensor
    lane_prompts: Tensor
    brings: Tensor
    lanes: Lanes | None = None  # older pickles have none
    alone: str = ""
    on: bool = False

    def __init__(
        self,
        site: str,
        plan: PromptPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        lanes: Lanes | None = None,
        alone: str = "",
    ) -> None:
        super().__init__()
        self.site, self.plan, self.lanes, self.alone = site, plan, lanes, alone
        room = torch.zeros(plan.rows, plan.width, device=device, dtype=dtype)
        self.register_buffer("prompt", room, persistent=False)
        if lanes is not None:
            self.register_buffer("lane_prompts", room.repeat(lanes.count + 1, 1, 1), persistent=False)
            self.register_buffer("brings", torch.zeros(lanes.count, dtype=torch.bool, device=device), persistent=False)

    @classmethod
    def of(cls, model: nn.Module, site: str, plan: PromptPlan, lanes: Lanes | None = None) -> PromptSlot:
        """A slot on the device of the site, in the dtype of its embeddings; the model is not touched."""
        host = submodule(model, site)
        device, _ = placement(host, model, autocast=False)
        weight: Tensor = submodule(host, plan.embed).weight  # type: ignore[assignment]
        alone = "" if lanes is None else why_alone(model, plan)
        return cls(site, plan, device=device, dtype=weight.dtype, lanes=lanes, alone=alone)

    def forward(self) -> Prompt | TokenPrompts:
        """The prompt of a call."""
        lanes = self.lanes
        if lanes is None:
            return self.prompt
        if lanes.named.mask.shape[0] == 0:
            return self.prompt if self.on else None
        if not lanes.prompted:
            return None
        picks = owners(lanes, self.brings)
        if picks.ndim > 1:  # tokens are named, and those of prompts are among them
            virtual = lanes.virtual
            places = picks * self.plan.rows + virtual.clamp(min=0)
            return TokenPrompts(self.lane_prompts.flatten(0, 1)[places], (virtual >= 0).unsqueeze(-1))
        there = None if self.alone else (picks < lanes.count).unsqueeze(-1)
        return RowPrompts(self.lane_prompts.index_select(0, picks), there, lanes.repeats)

    @torch.no_grad()
    def hold(self, lane: int, prompt: Tensor | None) -> None:
        """Have a prompt in a lane, or none."""
        if prompt is not None:
            self.lane_prompts[lane].copy_(prompt)
        self.brings[lane] = prompt is not None

    @torch.no_grad()
    def forget(self) -> None:
        """Have the room that stays zero so again, whatever memory it has now."""
        self.lane_prompts[-1].zero_()


#: what of rotary positions leaves scores as they are where a row begins later
_ROTARY = {
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip


def why_alone(model: nn.Module, plan: PromptPlan) -> str:
    """Why a row without a prompt can't be in a batch with rows that have one; empty: it can.

    In such a batch it is masked where the others have theirs, and so begins later. That is the same to a decoder whose
    positions are rotary, all of which count by differences, and whose outputs are read from the end.
    """
    config: Any = model.config
    text = config.get_text_config()
    if plan.task != "CAUSAL_LM" or text is not config:
        return f"its outputs ({plan.task}) are not read from the end of text alone"
    given = getattr(text, "rope_parameters", None) or {}
    each = [value for value in given.values() if isinstance(value, dict)] or ([given] if given else [])
    kinds = {str(rope.get("rope_type", "default")) for rope in each}
    other = {key for rope in each for key in rope} - _ROTARY
    if (
        not each
        or getattr(text, "alibi", False)
        or "rotary" not in str(getattr(text, "position_embedding_type", "rotary"))
    ):
        return "its positions are not rotary"
    if other or kinds - {"default", "linear", "llama3", "yarn"} or getattr(text, "attn_temperature_tuning", False):
        return f"its positions count from the beginning ({', '.join(sorted(kinds | other))})"
    layers = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if getattr(model, "_is_stateful", False) or layers - {"full_attention", "sliding_attention"}:
        return "it has layers that keep a state, or parts, which a mask doesn't reach"
    if "attention_mask" not in forward_arguments(submodule(model, "")):
        return "its forward takes no attention_mask"
    return ""


def declare(
    model: nn.Module, methods: Sequence[str], num_virtual_tokens: int | None, adapters: Sequence[Adapter]
) -> tuple[str, PromptPlan] | None:
    """Site and plan of the prompts to come; those that the model has say it too.

    Args:
        methods: some of those whose prompts are embeddings and share a slot, or some of those whose fill the cache.

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
    if len({known[m].in_cache for m in wanted}) > 1:
        filling = " and ".join(m for m in wanted if known[m].in_cache)
        raise AdapterError(f"methods: {filling} fills the cache, the others are embeddings; declare one of the two")
    if num_virtual_tokens is None and not own:
        raise AdapterError(f"{wanted[0]}: expected num_virtual_tokens, the length of the prompts to come, found None")
    if num_virtual_tokens is None:
        return own[0]
    method = known[wanted[0]]
    config: PromptLearningConfig = method.of_length(num_virtual_tokens)
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
    if why := method.unservable(adapter.config):
        return [f"{name}: {why}"]
    own = slot.plan
    for what, found, expected in (
        ("virtual tokens", _kind(plan), _kind(own)),
        ("num_virtual_tokens", plan.rank, own.rank),
        ("width", plan.width, own.width),
        ("task_type", plan.task, own.task),
    ):
        if found != expected:
            return [f"{name}: {what}: the slot was declared for {expected!r}, found {found!r}"]
    prompt = method.prompt(adapter.config, plan, adapter.values.sites[site])
    if len(prompt) != own.rows:  # of an encoder-decoder's there may be a second half, which nothing reads
        prompt = torch.cat((prompt[: plan.rank], prompt.new_zeros(own.rows - plan.rank, own.width)))
    adapter.prompt = prompt.to(slot.prompt.device, slot.prompt.dtype, copy=True).contiguous()
    return []


def _kind(plan: PromptPlan) -> str:
    return "keys and values" if plan.prefix else "embeddings"


@torch.no_grad()
def show(model: nn.Module, slot: PromptSlot | None, adapters: Sequence[Adapter]) -> None:
    """Put the prompt among ``adapters`` into the slot; without one the model runs its own forward.

    With lanes it is fed either way, since rows may have prompts at any time.
    """
    if slot is None:
        return
    host = submodule(model, slot.site)
    shown = next((a.prompt for a in adapters if a.prompt is not None), None)
    if slot.lanes is not None and slot.on is not (shown is not None):
        slot.on = shown is not None
    if shown is not None:
        slot.prompt.copy_(shown)
    elif slot.lanes is None:
        unbind(host)
        return
    if not is_bound(host):
        path, value = ("prompt", slot.prompt) if slot.lanes is None else ("", slot)
        feed_module(host, slot.plan.feed("slot", path, value, container="slot"), name=slot.site)
