"""Rows of an embedding for some tokens: in the place of its own where these are looked up, or scored by a head.

    y[token] = row of the token                        (look-up)
    y[..., token] = x . row of the token + bias        (head, whose weight has a row for each token too)

The other tokens are the base's. In a slot there are always as many places: what an adapter doesn't need repeats its
first token, so that a place is written twice with the same value. Without one all tokens are -1, which no input has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.container import Container
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.lanes import of_rows
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node


def token_rows(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, tokens: Tensor, rows: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The subgraph of an embedding, or of a head, with rows of its own; in training and in a slot.

    ``tokens``: [count], ``rows``: [count, width].
    """
    y = base(x)
    return looked_up(x, y, tokens, rows) if kind.looks_up else scored(x, y, tokens, rows, bias)


@one_node
def looked_up(x: Tensor, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Token ids ``[...]`` and what the base found for them, ``[..., width]``."""
    same = x.unsqueeze(-1) == tokens
    own = F.embedding(same.int().argmax(-1), rows).type_as(y)
    return torch.where(same.any(-1, keepdim=True), own, y)


@one_node
def scored(x: Tensor, y: Tensor, tokens: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """A head's input ``[..., width]`` and its output ``[..., vocabulary]``."""
    places = tokens.clamp(min=0)
    own = F.linear(x, rows.type_as(x), None if bias is None else bias.index_select(0, places).type_as(x)).type_as(y)
    own = torch.where(tokens < 0, y.index_select(-1, places), own)
    return y.index_copy(-1, places, own)


def token_rewrite(name: str, kind: Kind, path: str, tokens: Tensor, rows: Tensor, container: str) -> Rewrite:
    """The rewrite of a site that reads ``tokens`` and ``rows`` at a path below ``container``."""
    # a head's bias is added to a token's own score too
    reads = () if kind.looks_up else ("bias",)
    return Rewrite(name, token_rows, {f"{path}.tokens": tokens, f"{path}.rows": rows}, container=container, reads=reads)


class TokenSlot(Container):
    """Where the tokens and rows of a site of a prepared model are.

    Args:
        kind: the site's. count: how many tokens there is room for.
        lanes: a ``Lanes``, of a model whose rows may have adapters of their own: each lane has as much room, and one
            more holds nothing.
        site: the site's name, for messages.
    """

    tokens: Tensor
    rows: Tensor
    lane_tokens: Tensor  # with lanes: [lanes + 1, count], and so on
    lane_rows: Tensor

    def __init__(
        self, kind: Kind, count: int, *, device: torch.device, dtype: torch.dtype, lanes: Any = None, site: str = ""
    ) -> None:
        super().__init__()
        self.kind, self.lanes, self.site = kind, lanes, site
        width = kind.out_features if kind.looks_up else kind.in_features
        for name, leading in (("", ()), *([("lane_", (lanes.count + 1,))] if lanes is not None else [])):
            tokens = torch.full((*leading, count), -1, device=device)
            self.register_buffer(f"{name}tokens", tokens, persistent=False)
            rows = torch.zeros(*leading, count, width, device=device, dtype=dtype)
            self.register_buffer(f"{name}rows", rows, persistent=False)

    def rewrite(self) -> Rewrite:
        """The site's rewrite, of a module that holds this at ``slot.tokens``."""
        if self.lanes is None:
            return token_rewrite("tokens", self.kind, "tokens", self.tokens, self.rows, container="slot")
        reads = () if self.kind.looks_up else ("bias",)
        return Rewrite("tokens", lane_token_rows, {"tokens": self}, container="slot", reads=reads)

    @torch.no_grad()
    def hold(self, tokens: Sequence[int], rows: Tensor | None, lane: int | None = None) -> None:
        """Hold these rows ``[n, width]``; without any the site is the base's."""
        own = (self.tokens, self.rows) if lane is None else (self.lane_tokens[lane], self.lane_rows[lane])
        spare, ids = len(own[0]) - len(tokens), list(tokens)
        own[0].copy_(torch.tensor(ids + spare * (ids[:1] or [-1])))
        if rows is not None:
            own[1][: len(ids)].copy_(rows)
            own[1][len(ids) :].copy_(rows[:1].expand(spare, -1))


def lane_token_rows(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, tokens: TokenSlot, bias: Tensor | None = None
) -> Tensor:
    """The serving subgraph where rows of a batch may have adapters of their own."""
    return of_lanes(tokens, x, base(x), bias)


@one_node
def of_lanes(slot: TokenSlot, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`looked_up` or :func:`scored`, with the rows of the lane that each row of a batch, or token, names."""
    kind, picks = slot.kind, slot.lanes.named.picks
    if picks.shape[0] == 0:
        plain = (x, y, slot.tokens, slot.rows)
        return looked_up(*plain) if kind.looks_up else scored(*plain, bias)
    picks = of_rows(slot, x, picks.to(x.device).unsqueeze(-1))  # [..., 1], as x is before its features
    count = slot.tokens.shape[0]
    tokens = F.embedding(picks.squeeze(-1), slot.lane_tokens)  # [..., count]
    rows = slot.lane_rows.flatten(0, 1)
    if kind.looks_up:
        same = x.unsqueeze(-1) == tokens
        own = F.embedding(picks.squeeze(-1) * count + same.int().argmax(-1), rows).type_as(y)
        return torch.where(same.any(-1, keepdim=True), own, y)
    places = tokens.clamp(min=0).expand(*y.shape[:-1], count)
    columns = picks * count + torch.arange(count, device=x.device)
    own = F.linear(x, rows.type_as(x)).gather(-1, columns.expand(places.shape))  # the scores of all lanes, and its own
    if bias is not None:
        own = own + F.embedding(places, bias.unsqueeze(-1)).squeeze(-1).type_as(own)
    own = torch.where(tokens < 0, y.gather(-1, places), own.type_as(y))
    return y.scatter(-1, places, own)
