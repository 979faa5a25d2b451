"""Look-ups: ``nn.Embedding`` and what it is in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.spec import OpSpec, Places
from fxpeft.passes.targets.reading import Weight, argument

aten = torch.ops.aten
_OPTIONS = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}


@dataclass(frozen=True)
class Embedding(Kind):
    """``F.embedding``: ``in_features`` is the number of rows, ``out_features`` their width.

    ``options`` are the look-up's own (``padding_idx``, ``max_norm``, ...), applied to A's look-up too.
    """

    options: tuple[tuple[str, Any], ...] = field(default=())

    name = family = "embedding"
    is_linear = False
    looks_up = True
    takes_bias = False
    takes_gain = False
    takes_lanes = True

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """Token ids ``[...]`` to ``[..., rank]``: the ids' columns of A."""
        return F.embedding(x, a.t(), **dict(self.options))

    def leading(self, x: Tensor) -> torch.Size:
        return x.shape

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.t(), **dict(self.options))

    def why_no_delta(self, module: nn.Module) -> str | None:
        if dict(self.options).get("max_norm") is None:
            return None
        return "an embedding with max_norm rescales what it looks up, the update's part apart from the base's"


def _read(node: Node, weight: Weight) -> Embedding:
    options: tuple[tuple[str, Any], ...] = ()
    if node.target is F.embedding:
        given = enumerate(_OPTIONS.items(), 2)
        options = tuple((name, argument(node, (place, name), default)) for place, (name, default) in given)
    return Embedding(weight.shape[0], weight.shape[1], options)


def _of_module(module: nn.Module) -> Embedding | None:
    if not isinstance(module, nn.Embedding):
        return None
    options = tuple((name, getattr(module, name)) for name in _OPTIONS)
    return Embedding(module.num_embeddings, module.embedding_dim, options)


def _stub(kind: Kind, biased: bool) -> nn.Module:
    return nn.Embedding(kind.in_features, kind.out_features)


EMBEDDING = OpSpec(
    kind=Embedding,
    calls={
        F.embedding: Places(bias=None, flip=True),
        aten.embedding.default: Places(input=1, weight=(0, "weight"), bias=None, flip=True),
    },
    read=_read,
    modules=(nn.Embedding,),
    of_module=_of_module,
    flip=True,
    stub=_stub,
)
