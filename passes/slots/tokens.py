"""Rows of an embedding for some tokens: in the place of its own where these are looked up, or scored by a head.

    y[token] = row of the token                        (look-up)
    y[..., token] = x . row of the token + bias        (head, whose weight has a row for each token too)

The other tokens are the base's. In a slot there are always as many places: what an adapter doesn't need repeats its
first token, so that a place is written twice with the same value. Without one all tokens are -1, which no input has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpeft.passes.container import Container
from fxpeft.passes.rewrite.inject import Rewrite
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
    """

    tokens: Tensor
    rows: Tensor

    def __init__(self, kind: Kind, count: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        width = kind.out_features if kind.looks_up else kind.in_features
        self.register_buffer("tokens", torch.full((count,), -1, device=device), persistent=False)
        self.register_buffer("rows", torch.zeros(count, width, device=device, dtype=dtype), persistent=False)

    def rewrite(self) -> Rewrite:
        """The site's rewrite, of a module that holds this at ``slot.tokens``."""
        return token_rewrite("tokens", self.kind, "tokens", self.tokens, self.rows, container="slot")

    @torch.no_grad()
    def hold(self, tokens: Sequence[int], rows: Tensor) -> None:
        """Hold these rows ``[n, width]``; without any the site is the base's."""
        spare, ids = len(self.tokens) - len(tokens), list(tokens)
        first = ids[:1] or [-1]
        self.tokens.copy_(torch.tensor(ids + spare * first))
        self.rows[: len(ids)].copy_(rows)
        if ids:
            self.rows[len(ids) :].copy_(rows[:1].expand(spare, -1))
