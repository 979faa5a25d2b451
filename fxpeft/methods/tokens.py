"""Trainable tokens: some rows of an embedding are trained, and the others are the base's.

A method of its own (``TRAINABLE_TOKENS``), and what other methods' configs have beside their sites as
``trainable_token_indices``. Rows are values, not differences: the base's own, however it was resized, don't count.
The mathematics is :func:`fxpeft.passes.slots.tokens.token_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.without_sites import NamesConfig, WithoutSites
from fxpeft.passes.base import PassError
from fxpeft.passes.container import Read
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.tokens import token_rewrite
from fxpeft.passes.targets.kinds import Kind

NAME = "trainable_tokens"  # what slots are declared for


@dataclass(frozen=True)
class TokenRows:
    """The rows that an adapter has of its own at one module.

    Args:
        kind: the module's, an embedding or a linear head. tokens: the rows' numbers.
        tied: the embedding whose rows these are, since both modules have one weight; empty: they are its own.
    """

    kind: Kind
    tokens: tuple[int, ...]
    tied: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``[tokens, width]``."""
        return len(self.tokens), self.kind.out_features if self.kind.looks_up else self.kind.in_features

    def fresh(self, weight: Tensor, *, random: bool = False) -> Tensor:
        """The rows of the base's weight ``[vocabulary, width]``, or random ones.

        Raises:
            PassError: the weight is on the meta device.
        """
        if random:
            return torch.randn(self.shape, dtype=weight.dtype, device=weight.device)
        if weight.is_meta:
            raise PassError("it is on the meta device or offloaded; load it onto a device first")
        return weight.detach()[list(self.tokens)].clone()


def check_tokens(name: str, tokens: Sequence[Any]) -> None:
    """Refuse what are no rows' numbers, each once.

    Raises:
        AdapterError: the field is named.
    """
    wrong = [t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or t < 0]
    if wrong or not tokens:
        raise AdapterError(
            f"{name}: expected numbers of tokens, from 0 on, found {short(wrong[0] if wrong else tokens)}"
        )
    if len(set(tokens)) < len(tokens):
        twice = next(t for t in tokens if list(tokens).count(t) > 1)
        raise AdapterError(f"{name}: expected each token once, found {twice} again")


@dataclass
class TrainableTokensConfig(NamesConfig):
    """Names and defaults of ``peft.TrainableTokensConfig``.

    Args:
        token_indices: which tokens' rows are trained.
        target_modules: the embeddings; ``None``: the model's input embeddings. What has their weight, as a tied head,
            follows these.
        init_weights: start from the base's rows; ``False``: at random.
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("token_indices", self.token_indices)


def starts_from_rows(config: AdapterConfig) -> bool:
    """Whether a fresh adapter's rows are the base's."""
    return not isinstance(config, TrainableTokensConfig) or config.init_weights


class TokenPart(Read):
    """An adapter's rows at one module while it is attached.

    Args:
        rows: of the adapter's own; a tied head has none and :meth:`share` s the embedding's.
    """

    rows: Tensor
    tokens: Tensor
    shared: TokenPart

    def __init__(self, plan: TokenRows, rows: Tensor | None) -> None:
        super().__init__()
        self.plan = plan
        device = None if rows is None or rows.is_meta else rows.device
        self.register_buffer("tokens", torch.tensor(plan.tokens, device=device), persistent=False)
        if rows is not None:
            self.rows = nn.Parameter(rows)

    def share(self, other: TokenPart) -> None:
        """Read another module's rows; they are trained, moved and listed there."""
        vars(self)["shared"] = other

    def rewrite(self, name: str) -> Rewrite:
        """The training subgraph; ``name`` as in :meth:`~fxpeft.methods.base.Method.rewrite`."""
        path, held = (f"{name}.shared", self.shared) if self.plan.tied else (name, self)
        return token_rewrite(f"tokens:{name}", self.plan.kind, path, held.tokens, held.rows, container="adapters")

    def extra_repr(self) -> str:
        """How many tokens, and whose rows they are."""
        return f"tokens={len(self.plan.tokens)}" + (f", tied to {self.plan.tied}" if self.plan.tied else "")


class TrainableTokens(WithoutSites[TrainableTokensConfig]):
    """Rows alone; :mod:`fxpeft.targets.tokens` finds out whose."""

    name = NAME
    peft_type = "TRAINABLE_TOKENS"
    config_class = TrainableTokensConfig
    tokens_key = "trainable_tokens_delta"
