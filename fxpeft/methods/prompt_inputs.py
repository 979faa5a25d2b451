"""What a soft prompt does to the arguments of a model's forward and of ``generate``. PEFT's rules.

These functions run inside the generated forward (see :mod:`fxpeft.passes.rewrite.feed`), eager or traced by
Dynamo. A forward that continues a filled cache has its virtual tokens in the cache already: there
the attention mask has to cover them, and that is all.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from fxpeft.errors import AdapterError
from fxpeft.methods.row_prompts import Prompt, RowPrompts, TaskPrompts, TokenPrompts

IGNORED = -100  # a label that no loss counts
OF_TRAINING = {  # arguments of prompts in training -> why a slot takes none
    "task_ids": "a slot holds one task's prompt, the rows of a batch name theirs as adapters (fxpeft.rows)",
    "input_type_mask": "a slot's forward counts labels as the model does",
}
# what forwards and generate call the cache: since transformers 5.24, before, and a state-space model's before
CACHES = ("cache", "past_key_values", "cache_params")


def cache_argument(arguments: Mapping[str, inspect.Parameter]) -> str:
    """The name under which a forward takes a ``Cache``, or ``""``."""
    for name in CACHES:
        # XLM's ``cache`` is no such: its forward takes as many tokens off the input as the cache is long
        if name in arguments and not str(arguments[name].annotation).startswith("dict["):
            return name
    return ""


def embed_prompt(
    inputs: dict[str, Any],
    *,
    prompt: Prompt | TokenPrompts,
    embed: nn.Module,
    virtual: int,
    task: str,
    cache: str,
    served: bool = False,
) -> dict[str, Any]:
    """Prompt tuning and its kin: put virtual tokens before the embeddings.

    Args:
        inputs: the forward's arguments by name.
        prompt: ``[rows, hidden]``, the same for the whole batch or each row's own; the first ``virtual`` rows are used.
            Of tokens: they take the place of the embeddings of tokens that are there.
        embed: the model's input embeddings.
        task: PEFT's task type; it says what becomes of labels and token types.
        cache: the forward's name of its cache; see :func:`cache_argument`.
        served: the prompt is a slot's, finished: what a prompt in training is told by is refused.

    Returns:
        The arguments with ``inputs_embeds [batch, virtual + tokens, hidden]`` in place of ``input_ids``.
    """
    for name in OF_TRAINING if served else ():
        if inputs.get(name) is not None:
            raise AdapterError(f"{name}: {OF_TRAINING[name]}; leave it out")
    if prompt is None or inputs.get("encoder_outputs") is not None:
        return inputs  # the encoder has seen the prompt, and generate has extended its mask
    inputs = _renamed(inputs, cache)
    out = dict(inputs)
    if isinstance(prompt, TokenPrompts):
        tokens = embed(out["input_ids"]) if out.get("inputs_embeds") is None else out["inputs_embeds"]
        out["inputs_embeds"], out["input_ids"] = torch.where(prompt.there, prompt.values.to(tokens), tokens), None
        return out
    _drop(out, "position_ids", "they are counted with the virtual tokens")
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        out["token_type_ids"] = _extended(out.get("token_type_ids"), virtual, 0)
    else:
        _drop(out, "token_type_ids", "virtual tokens have no type")
    mask = out.get("attention_mask")
    if task != "SEQ_2_SEQ_LM" and _is_filled(out.get(cache), mask):
        alone = _is_complete(mask) or _is_state(out[cache])
        out["attention_mask"] = mask if alone else _covered(mask, virtual, prompt, out, out[cache])
        return _known(out, inputs)
    _check_mask(mask)
    out["attention_mask"] = _covered(mask, virtual, prompt, out)
    if task in ("CAUSAL_LM", "TOKEN_CLS"):
        out["labels"] = _extended(out.get("labels"), virtual, IGNORED)
    tokens = out.get("inputs_embeds")
    if tokens is None:
        tokens = embed(out["input_ids"])
    out["inputs_embeds"] = torch.cat((_for_rows(prompt, virtual, tokens), tokens), dim=1)
    out["input_ids"] = None
    return _known(out, inputs)


def cache_prompt(
    inputs: dict[str, Any],
    *,
    prompt: Prompt,
    embed: nn.Module,
    virtual: int,
    layers: int,
    heads: int,
    task: str,
    cache: str,
    shapes: tuple[tuple[int, int] | None, ...] = (),
    layer: nn.Module | None = None,
) -> dict[str, Any]:
    """Prefix tuning: begin each layer's keys and values with virtual ones.

    Args:
        inputs: the forward's arguments by name.
        prompt: ``[virtual, layers * 2 * heads * head_dim]``, for the whole batch or each row's own.
        embed: the model's input embeddings; their dtype is the cache's.
        cache: the forward's name of its cache; see :func:`cache_argument`.
        shapes: the heads and their width that each layer takes of those, where they are not all alike; ``None`` for
            a layer that takes none.
        layer: one of the model's layers, asked whether it is checkpointed.

    Returns:
        The arguments with a cache that holds ``virtual`` tokens: the given one, filled, where it was
        empty, or a new one. A filled cache is left as it is.

    Raises:
        AdapterError: gradient checkpointing, under which transformers drops the cache.
    """
    if layer is not None and layer.training and layer.gradient_checkpointing:
        raise AdapterError(
            "prefix tuning doesn't work with gradient checkpointing, under which layers get no cache: call "
            "model.gradient_checkpointing_disable(), or use prompt tuning"
        )
    if prompt is None:
        return inputs
    inputs = _renamed(inputs, cache)
    out = dict(inputs)
    decoder = task == "SEQ_2_SEQ_LM"
    mask_key = "decoder_attention_mask" if decoder else "attention_mask"
    mask, given = out.get(mask_key), out.get(cache)
    if out.get("position_ids") is not None:
        out["position_ids"] = out["position_ids"] + virtual
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        _drop(out, "token_type_ids", "virtual tokens have no type")
    filled = _is_filled(given, mask)
    if not filled:
        _check_mask(mask)
        weight: Any = embed.weight
        states = _states(prompt, weight.dtype, layers, heads, _batch(out))
        out[cache] = _with_prefix(given, states, shapes or ((heads, states.shape[-1]),) * layers, decoder)
    if not _is_complete(mask):
        out[mask_key] = _covered(mask, virtual, prompt, out, given if filled else None)
    return _known(out, inputs)


def _states(prompt: Tensor | RowPrompts, dtype: torch.dtype, layers: int, heads: int, batch: int) -> Tensor:
    """``[virtual, 2 * layers * heads * head_dim] -> [2 * layers, batch, heads, virtual, head_dim]``."""
    if isinstance(prompt, RowPrompts):
        own = prompt.of(batch).values.to(dtype)
        return own.view(batch, own.shape[1], 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
    states = prompt.to(dtype).view(prompt.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return states.unsqueeze(1).expand(-1, batch, -1, -1, -1)


def _with_prefix(cache: Any, states: Tensor, shapes: tuple[tuple[int, int] | None, ...], decoder: bool) -> Any:
    """The cache with each layer's part of :func:`_states`; the first heads and numbers where a layer is smaller."""
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if decoder else DynamicCache()
    own = cache.self_attention_cache if decoder else cache
    for layer, shape in enumerate(shapes):
        if shape is None:
            continue
        heads, width = shape
        # an encoder-decoder's prompt is laid out twice, for self and cross attention, and PEFT then reads
        # four rows a layer, of which the first two are used
        first = 4 * layer % (2 * len(shapes)) if decoder else 2 * layer
        own.update(*(part[:, :heads, :, :width] for part in states[first : first + 2]), layer)
    return cache


class FedModel:
    """Mixin of every model whose forward is fed: it keeps its class's name."""


class PromptGeneration(FedModel):
    """What ``generate`` asks of a model besides its forward, with the virtual tokens counted in."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``. An encoder sees the prompt before the decoder's loop begins."""
        virtual, prompt = _encoder_prompt(self)
        if prompt is None or kwargs.get("encoder_outputs") is not None:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        if isinstance(prompt, TaskPrompts):
            prompt = prompt.of(kwargs.pop("task_ids", None))
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        with torch.no_grad():
            tokens = kwargs.pop("inputs_embeds", None)
            if tokens is None:
                if ids is None:
                    raise AdapterError("generate: expected input_ids or inputs_embeds, found neither")
                tokens = self.get_input_embeddings()(ids)  # type: ignore[attr-defined]
            rows = _for_rows(prompt, virtual, tokens)
        kwargs["inputs_embeds"] = torch.cat((rows, tokens), dim=1)
        kwargs["attention_mask"] = _extended(kwargs.get("attention_mask"), virtual, prompt)
        return super().generate(None, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with a mask that covers the virtual tokens where it has four dimensions.

        ``generate`` makes such a mask for a static cache, so that a compiled step has one shape. In
        the first step the forward itself makes room for the virtual tokens: it gets the plain mask.
        """
        virtual, key = _decoder_virtual(self)
        if not virtual:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        name = next((n for n in CACHES if n in kwargs), CACHES[0])
        if kwargs.get("use_cache") is False and name in kwargs:
            kwargs[name] = None  # a step gives back the prefix's cache, the next begins one of its own
        mask, cache = kwargs.get(key), kwargs.get(name)
        if cache is None and kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            raise AdapterError(
                f"generate: {type(self).__name__} keeps no cache of its past, so that every step would begin with the "
                "prompt again; pass use_cache=False"
            )
        filled, (_, prompt) = _is_filled(cache, mask), _of_lanes(self)
        new = input_ids if (count := kwargs.get("next_sequence_length")) is None else input_ids[:, -count:]
        if filled and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] += virtual  # generate took the cache's length from that of the tokens
        if filled and cache is not None and cache.is_compileable and not _is_state(cache):
            kwargs[key] = _covered(mask, virtual, prompt, {"input_ids": new}, cache)
        made = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if not _is_complete(made.get(key)):
            if not (filled and _is_state(cache)):
                made[key] = mask
        elif not filled:
            _check_mask(mask)
            made[key] = mask
        if not _is_prefix(self):
            made.pop("position_ids", None)  # the model counts them from the cache, as under PEFT
        return made

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        virtual, _ = _decoder_virtual(self)
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + virtual
        )


def _running(model: Any) -> tuple[Any, Callable[[], Any]]:
    """The plan of the prompt that the model runs now, and what gives the prompt."""
    slot = model._modules.get("slot")
    if slot is not None:
        return slot.plan, slot
    for adapter in vars(model)["_fxpeft"].running():
        plan = adapter.plan.sites.get("")
        if plan is not None:
            return plan, adapter.parts[""]
    raise AdapterError(f"{type(model).__name__} runs a prompt's forward, but no prompt is active")


def _of_lanes(model: Any) -> tuple[bool, Any]:
    """Whether slots have lanes, so that calls may have no prompt or each row its own; and that, where they have."""
    slot = model._modules.get("slot")
    return (True, slot()) if slot is not None and slot.lanes is not None else (False, None)


def _encoder_prompt(model: Any) -> tuple[int, Prompt | TaskPrompts]:
    plan, prompt = _running(model)
    encoder = plan.task == "SEQ_2_SEQ_LM" and not plan.prefix
    with torch.no_grad():
        return plan.rank, prompt() if encoder else None


def _decoder_virtual(model: Any) -> tuple[int, str]:
    """How many virtual tokens the decoder's cache holds, and the name of the mask that covers them."""
    plan, (lanes, prompt) = _running(model)[0], _of_lanes(model)
    virtual = 0 if lanes and (prompt is None or isinstance(prompt, TokenPrompts)) else plan.rank
    if plan.task != "SEQ_2_SEQ_LM":
        return virtual, "attention_mask"
    return virtual if plan.prefix else 0, "decoder_attention_mask"


def _is_prefix(model: Any) -> bool:
    return bool(_running(model)[0].prefix)


def _renamed(inputs: dict[str, Any], cache: str) -> dict[str, Any]:
    """The arguments with a cache under the forward's own name, where it came under one that it had before."""
    old = [name for name in CACHES[1:] if name != cache and name in inputs]
    if cache != CACHES[0] or not old:
        return inputs
    out = {name: value for name, value in inputs.items() if name not in old}
    for name in old:
        if not torch.compiler.is_compiling():
            warnings.warn(f"{name} is deprecated in transformers: use {cache}", FutureWarning, stacklevel=4)
        if out.get(cache) is None:
            out[cache] = inputs[name]
    return out


def _is_filled(cache: Any, mask: Any) -> bool:
    """Whether a forward continues a cache, so that the virtual tokens are in it."""
    if cache is None:
        return False
    if _is_state(cache):
        return bool(cache.has_previous_state())
    if torch.compiler.is_compiling() and cache.is_compileable and _is_complete(mask):
        return True  # a step of generate: its first is never compiled. The length, a tensor, is not asked
    return bool(cache.get_seq_length())


def _is_state(cache: Any) -> bool:
    """Whether a cache holds states without a length in all layers; masks are then of the new tokens alone."""
    linear = list(getattr(cache, "is_linear", ()))
    return bool(linear) and all(linear)


def _is_complete(mask: Any) -> bool:
    """Whether a mask is one per query and layer type, made by ``generate``: it covers the whole cache."""
    return isinstance(mask, dict) or (mask is not None and mask.dim() != 2)


def _check_mask(mask: Any) -> None:
    if _is_complete(mask):
        found = "a dict" if isinstance(mask, dict) else list(mask.shape)
        raise AdapterError(
            f"attention_mask: expected [batch, tokens], found {found}: a prompt's virtual tokens can't be put into it"
        )


def _for_rows(prompt: Tensor | RowPrompts, virtual: int, tokens: Tensor) -> Tensor:
    """The virtual tokens of a batch, ``[batch, virtual, hidden]``, as its embeddings are."""
    if isinstance(prompt, RowPrompts):
        return prompt.of(tokens.shape[0]).values[:, :virtual].to(tokens)
    return prompt[:virtual].to(tokens).expand(tokens.shape[0], -1, -1)


def _covered(mask: Any, virtual: int, prompt: Prompt, inputs: dict[str, Any], cache: Any = None) -> Any:
    """A mask ``[batch, tokens]`` that covers virtual tokens too. There has to be one where a row has none.

    Args:
        inputs: the forward's arguments, where it got no mask. cache: what is filled, virtual tokens among it.
    """
    if mask is None and isinstance(prompt, RowPrompts) and prompt.there is not None:
        tokens = next(inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None)
        length = virtual if cache is None else cache.get_seq_length()
        past = (int(length) if isinstance(length, Tensor) else length) - virtual
        mask = tokens.new_ones((tokens.shape[0], past + tokens.shape[1]), dtype=torch.long)
    return _extended(mask, virtual, prompt)


def _extended(tensor: Any, virtual: int, value: Any) -> Any:
    """``[batch, tokens]`` with ``virtual`` columns of a value before; ``None`` stays.

    Args:
        value: a number; or the prompt that a mask is to cover, where rows that have none are to have zeros.
    """
    if tensor is None:
        return None
    there = value.of(tensor.shape[0]).there if isinstance(value, RowPrompts) else None
    if there is not None:
        return torch.cat((there.to(tensor).expand(-1, virtual), tensor), dim=1)
    number = value if isinstance(value, int) else 1
    return torch.cat((tensor.new_full((tensor.shape[0], virtual), number), tensor), dim=1)


def _batch(inputs: dict[str, Any]) -> int:
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "labels")
    tensor = next(inputs[n] for n in names if inputs.get(n) is not None)
    return int(tensor.shape[0])


def _drop(inputs: dict[str, Any], name: str, why: str) -> None:
    if inputs.get(name) is not None:
        if not torch.compiler.is_compiling():
            warnings.warn(f"{name} are ignored under a soft prompt, as in PEFT: {why}", stacklevel=4)
        inputs[name] = None


def _known(out: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Only arguments that the forward has, or was called with."""
    return {name: value for name, value in out.items() if name in inputs or value is not None}
