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
    """What is known of a call: its tokens ``[rows, tokens]``, or how many there are; the cache that it goes on from."""

    ids: Tensor | None
    sizes: tuple[int, ...]
    cache: Any


def call_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """A call of a whole model: its tokens are ``input_ids``, or what comes first, if those are whole numbers."""
    ids, cache = kwargs.get("input_ids", args[0] if args else None), cache_in([*args, *kwargs.values()])
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2:
        return Call(ids, tuple(ids.shape), cache)
    given = kwargs.get("inputs_embeds", ids)
    return Call(None, tuple(given.shape[:2]) if isinstance(given, Tensor) and given.ndim > 2 else (), cache)


def mask_of(call: Call, tokens: Tokens) -> tuple[Tensor, Seen | None]:
    """Which tokens of a call ``[rows, tokens]`` an adapter acts on, and what its cache is to be marked with.

    Args:
        tokens: of the invocation; none: all tokens of the call are acted on.

    Raises:
        AdapterError: the cache is of another number of rows.
    """
    if not tokens:
        return everywhere(*call.sizes), None
    if call.ids is None:
        warnings.warn(
            "alora_invocation_tokens are looked for in input_ids, and this call has none: the adapter acts on none of "
            "its tokens, as in PEFT",
            stacklevel=2,
        )
        return nowhere(), None
    ids, past = call.ids.detach(), 0 if call.cache is None else call.cache.get_seq_length()
    rows, count = ids.shape
    before: Seen | None = getattr(call.cache, MARK, {}).get(tokens)
    starts, text = torch.full((rows,), FAR, device=ids.device), ids
    if before is not None:
        starts, last = (_repeated(each.to(ids.device), rows) for each in before)
        starts = torch.where(starts < past, starts, FAR)  # what was cropped off the cache is there no more
        text = torch.cat((last, ids), 1)
    if before is None or count > 1:  # a token that generate has just made is none of the prompt's
        starts = _found(text, tokens, past - (text.shape[1] - count), starts)
    mask = past + torch.arange(count, device=ids.device) >= starts.unsqueeze(1)
    return mask, Seen(starts, text[:, max(text.shape[1] - len(tokens) + 1, 0) :])


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
