"""Invocations: from which tokens of a call on an adapter acts that has ``alora_invocation_tokens``.

They are looked for in the tokens that the model is called with, the last occurrence in a row counts, as in PEFT. What
goes on from a cache goes on from what was found in its calls before: the mark is on the cache, and so it goes where the
cache goes, through ``generate`` with beams and in a loop of one's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxpeft.errors import AdapterError
from fxpeft.passes.slots.reach import everywhere, nowhere

MARK = "_fxpeft_invoked"  # where a cache has what was found in its calls: tokens -> Seen
FAR = torch.iinfo(torch.long).max  # the place of what isn't there
Tokens: TypeAlias = tuple[int, ...]


class Seen(NamedTuple):
    """What the calls of a cache were found to have.

    ``starts``: ``[rows]``, the place of the last occurrence. ``last``: the last tokens, ``[rows, n]``, in which one may
    begin that the next call ends.
    """

    starts: Tensor
    last: Tensor


class Call(NamedTuple):
    """What is known of a call.

    ``ids``: its tokens ``[rows, tokens]``; ``sizes``: how many there are, if that is known. ``cache``: what it goes on
    from. ``packed``: its rows hold several sequences each. ``kept``: how many of its tokens, the last ones, the head
    sees; 0: all. ``found``: what it was found to have, for each invocation.
    """

    ids: Tensor | None
    sizes: tuple[int, ...]
    cache: Any
    packed: bool
    kept: int
    found: dict[Tokens, Seen]

    def past(self) -> int | Tensor:
        """How many tokens of each row its cache holds."""
        held: int | Tensor = 0 if self.cache is None else self.cache.get_seq_length()
        return held

    def places(self) -> Tensor:
        """Where its tokens are in their rows, ``[tokens]``."""
        return self.past() + torch.arange(self.sizes[1], device=None if self.ids is None else self.ids.device)


def call_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """A call of a whole model: its tokens are ``input_ids``, or what comes first, if those are whole numbers."""
    ids, cache = kwargs.get("input_ids", args[0] if args else None), cache_in([*args, *kwargs.values()])
    packed, kept = kwargs.get("cu_seq_lens_q") is not None, kwargs.get("logits_to_keep")
    kept = kept if isinstance(kept, int) else 0
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2:
        return Call(ids.detach(), tuple(ids.shape), cache, packed, kept, {})
    given = kwargs.get("inputs_embeds", ids)
    sizes = tuple(given.shape[:2]) if isinstance(given, Tensor) and given.ndim > 2 else ()
    return Call(None, sizes, cache, packed, kept, {})


def invoked(input_ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Which tokens an activated LoRA acts on: those from the last occurrence of its invocation in their row on.

    It is what a program that was rewritten for one takes as ``adapter_reach``. Of a call that goes on from a cache
    those of its tokens are the last ones of the whole text's: ``invoked(text, invocation)[:, -input_ids.shape[1]:]``.

    Args:
        input_ids: ``[rows, tokens]``. invocation: as ``alora_invocation_tokens``; none: all tokens are acted on.

    Returns:
        ``[rows, tokens]``, of bool.

    Raises:
        AdapterError: the ids are no whole numbers of rows of tokens.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise AdapterError(f"input_ids: expected [rows, tokens], found {input_ids.dtype} {list(input_ids.shape)}")
    return mask_of(call_of((input_ids,), {}), tuple(invocation))[0].to(input_ids.device)


def mask_of(call: Call, tokens: Tokens) -> tuple[Tensor, Seen | None]:
    """Which tokens of a call ``[rows, tokens]`` an adapter acts on, and what a cache that it makes is marked with.

    Args:
        tokens: of the invocation; none: all tokens of the call are acted on.

    Raises:
        AdapterError: as :func:`seen_in`.
    """
    if not tokens:
        return everywhere(*call.sizes), None
    seen = seen_in(call, tokens)
    return (nowhere() if seen is None else call.places() >= seen.starts.unsqueeze(1)), seen


def seen_in(call: Call, tokens: Tokens) -> Seen | None:
    """Where an invocation is in a call and those before it; ``None``: its tokens aren't known. The cache is marked.

    Raises:
        AdapterError: the cache is of another number of rows, or a row of the call holds several sequences.
    """
    if tokens in call.found:
        return call.found[tokens]
    if call.packed:
        raise AdapterError(
            "alora_invocation_tokens: this call holds several sequences in one row (cu_seq_lens_q), as continuous "
            "batching and padding-free batches do, and an invocation is looked for in a row: call with a row for each "
            "sequence (generate), or name adapters for each token: fxpeft serve does, and fxpeft.tokens with lanes"
        )
    if call.ids is None:
        warnings.warn(
            "alora_invocation_tokens are looked for in input_ids, and this call has none: the adapter acts on none of "
            "its tokens, as in PEFT",
            stacklevel=2,
        )
        return None
    ids, past = call.ids, call.past()
    rows, count = ids.shape
    before: Seen | None = getattr(call.cache, MARK, {}).get(tokens)
    starts, text = torch.full((rows,), FAR, device=ids.device), ids
    if before is not None:
        starts, last = (_repeated(each.to(ids.device), rows) for each in before)
        starts = torch.where(starts < past, starts, FAR)  # what was cropped off the cache is there no more
        text = torch.cat((last, ids), 1)
    if before is None or count > 1:  # a token that generate has just made is none of the prompt's
        starts = _found(text, tokens, past - (text.shape[1] - count), starts)
    seen = call.found[tokens] = Seen(starts, text[:, max(text.shape[1] - len(tokens) + 1, 0) :])
    mark(call.cache, tokens, seen)
    return seen


def cache_in(values: Any) -> Any:
    """Transformers' cache among a call's arguments or in its output, whatever it goes by there, or ``None``."""
    held = values.values() if isinstance(values, Mapping) else values if isinstance(values, Sequence) else ()
    return next((value for value in held if hasattr(value, "get_seq_length")), None)


def _found(text: Tensor, tokens: Tokens, first: Any, otherwise: Tensor) -> Tensor:
    """Where the last occurrence begins in each row, whose first token is at the place ``first``."""
    if text.shape[1] < len(tokens):
        return otherwise
    wanted = torch.tensor(tokens, device=text.device)
    at = (text.unfold(1, len(tokens), 1) == wanted).all(-1)
    places = torch.arange(at.shape[1], device=text.device)
    last = torch.where(at, places, -1).amax(1)
    return torch.where(last < 0, otherwise, last + first)


def _repeated(seen: Tensor, rows: int) -> Tensor:
    if rows % max(len(seen), 1) or rows < len(seen):
        raise AdapterError(
            f"cache: expected one of calls with {rows} rows, found of {len(seen)}, in which "
            "alora_invocation_tokens were looked for; call with the cache of these rows, or with a new one"
        )
    return seen.repeat_interleave(rows // len(seen), 0)


def mark(cache: Any, tokens: Tokens, seen: Seen | None) -> None:
    """Let the calls that go on from a cache know what was found."""
    if seen is not None and cache is not None:
        vars(cache).setdefault(MARK, {})[tokens] = seen
