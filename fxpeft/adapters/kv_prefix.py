"""Prefixes that begin with a text's own keys and values, as cartridges do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.change import changes
from fxpeft.adapters.contexts import disabled
from fxpeft.adapters.injection import load_adapter_state_dict
from fxpeft.adapters.saving import adapter_state_dict
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.prefixes import PrefixMethod, prefix_of
from fxpeft.methods.prompts import KEY
from fxpeft.model.wrappers import unwrap


@changes
@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, past_key_values: Any, adapter_name: str | None = None
) -> Tensor:
    """Give a cartridge, or a prefix without a projection, the first keys and values of a filled cache.

    Args:
        past_key_values: a ``Cache`` of one row, or key and value of each layer, ``[1, heads, tokens, width]``.
        adapter_name: the active adapter by default.

    Returns:
        The prefix, ``[virtual tokens, width]``.

    Raises:
        AdapterError: another sort of adapter, or a cache that is too short or another model's; nothing was changed.
    """
    model = unwrap(model)
    adapter = _prefix(model, adapter_name)
    prefix = prefix_of(next(iter(adapter.plan.sites.values())), past_key_values)
    held = adapter_state_dict(model, adapter.name)
    load_adapter_state_dict(model, {**held, KEY: prefix.to(held[KEY])}, adapter.name)
    return prefix


def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """The same from a text, which the bare model reads once: the prefix is what it keeps of the first tokens.

    Args:
        tokenizer: a tokenizer of Transformers'. use_chat_template: the text is a system's message, where the tokenizer
            has a template. max_length: how many tokens are read at most; default: all.

    Raises:
        AdapterError: as above, or the text has fewer tokens than the prefix.
    """
    inner: Any = unwrap(model)
    _prefix(inner, adapter_name)
    ids: Tensor | None = None
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": text}], tokenize=True, return_dict=False, return_tensors="pt"
        )
    if ids is None:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids is not None
    ids = ids[:, :max_length].to(inner.get_input_embeddings().weight.device)
    with disabled(model), torch.no_grad():
        read = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = read["cache"] if "cache" in read else read["past_key_values"]
    return initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, adapter_name=adapter_name)


def _prefix(model: nn.Module, name: str | None) -> Adapter:
    adapter = state_of(model).chosen(name)
    method = method_of(adapter.config)
    if not isinstance(method, PrefixMethod) or getattr(adapter.config, "prefix_projection", False):
        raise AdapterError(
            f"adapter {adapter.name!r}: expected a cartridge, or a prefix without a projection, whose values are keys "
            f"and values themselves, found {method.name}"
        )
    return adapter
