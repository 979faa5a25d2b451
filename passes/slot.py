"""The universal slot: static placeholders at one site that any lowered adapter is copied into.

    y = base(x) + expand(reduce(x, A[:r]) * d[:r], B[:r]) + shift

A, B and d hold ``max_rank`` ranks, rank first. In *dynamic* mode the subgraph narrows them to the
rank in use, which it reads as the *size* of a carrier tensor: a size is symbolic in a compiled
graph, so one graph serves every rank and does only that rank's work. In *static* mode all ranks
are computed, and the unused ones are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxpeft.passes.inject import Rewrite
from fxpeft.passes.kinds import Kind
from fxpeft.passes.live import Container

LEAST = 2  # Dynamo specialises sizes 0 and 1, so ranks start at 2; rank 1 is padded


class ActiveRank:
    """The rank in use, as the size of ``carrier``, shared by all slots of a model.

    A plain object on purpose: Dynamo specialises tensors and ints that it finds on a module, and
    this one it keeps symbolic.
    """

    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.set(LEAST)

    def set(self, rank: int) -> int:
        """Make ``rank`` the active one, at least :data:`LEAST`; returns what was set."""
        self.rank = max(rank, LEAST)
        self.carrier = torch.empty(self.rank, 0)
        if self.max_rank > LEAST:
            torch._dynamo.mark_dynamic(self.carrier, 0, min=LEAST, max=self.max_rank)
        return self.rank

    def __getstate__(self) -> tuple[int, int]:
        return self.max_rank, self.rank

    def __setstate__(self, state: tuple[int, int]) -> None:
        self.max_rank = state[0]
        self.set(state[1])  # a pickled tensor would have lost its mark


class Slot(Container):
    """One site's placeholders, as buffers that no ``state_dict`` holds.

    Args:
        kind: the site's kind.
        rank: the model's active rank, or ``None`` for static mode.
        shift: whether the slot takes a term per output (``lora_bias``).
    """

    a: Tensor
    b: Tensor
    d: Tensor
    shift: Tensor
    generation: ClassVar[int] = 0  # counts new and replaced placeholders (``.to(device)``): views made before are stale

    def __init__(
        self,
        kind: Kind,
        max_rank: int,
        rank: ActiveRank | None,
        *,
        shift: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        Slot.generation += 1
        self.kind, self.rank = kind, rank
        self.windows: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}  # views, kept by the swap
        shapes = {"a": kind.a_shape(max_rank), "b": (max_rank, kind.out_features)}
        if shift:
            shapes["shift"] = (kind.out_features,)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        # float32 whatever the model's dtype: alpha / rank in bfloat16 would be off by up to 0.4%
        self.register_buffer("d", torch.zeros(max_rank, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        d = self.d
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.d = d.to(self.a.device)
        Slot.generation += 1
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a pickled view would come back as a tensor of its own, and swaps would write beside the slot
        return {**vars(self), "windows": {}}

    def rewrite(self) -> Rewrite:
        """The site's rewrite; its operands are reachable at ``slot.<name>``."""
        operands: dict[str, Any] = dict(self._buffers)
        operands = {name: operands[name] for name in ("a", "b", "d", "shift") if name in operands}
        if self.rank is not None:
            operands["rank"] = self.rank
        return Rewrite("slot", slot, operands, container="slot")


def slot(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    rank: ActiveRank | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The serving subgraph. Narrows dimension 0 only: on any other, ``rank == max_rank`` adds a guard."""
    y = base(x)
    if rank is not None:
        r = rank.carrier.size(0)
        a, b, d = a.narrow(0, 0, r), b.narrow(0, 0, r), d.narrow(0, 0, r)
    update = kind.expand_rows(kind.scale(kind.reduce(x, a), d), b)
    if shift is not None:
        update = update + kind.per_output(shift)
    return (y + update).type_as(y)
