"""A module of which the rows, or tokens, of one batch have copies each of their own: heads that adapters bring whole.

There is a copy for each lane, and one with the base's values for rows whose adapters bring none. A compiled graph calls
all of them with the whole batch and chooses by rows, whatever these name, so that it is one graph for any mixture.
Where nothing is compiled, only those that some row has are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.passes.container import Container
from fxpeft.passes.slots.lanes import Lanes, for_rows, owners
from fxpeft.passes.torch_private import is_recorded, pytree


class LaneModules(Container):
    """What stands at ``slot`` in a module that adapters bring whole.

    Args:
        module: the copy that a call without rows runs.
        copies: one for each lane, and the base's.
        site: the module's name, for messages.

    ``brings``: ``[lanes]``, whether the adapter in a lane brings the module.
    """

    module: nn.Module
    brings: Tensor

    def __init__(self, module: nn.Module, copies: Sequence[nn.Module], lanes: Lanes, site: str) -> None:
        super().__init__()
        self.add_module("module", module)
        self.copies, self.lanes, self.site = nn.ModuleList(copies), lanes, site
        device = next((t.device for t in module.buffers()), None)
        self.register_buffer("brings", torch.zeros(lanes.count, dtype=torch.bool, device=device), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if self.lanes.named.mask.shape[0] == 0:
            return self.module(*args, **kwargs)
        picks = owners(self.lanes, self.brings)
        numbers: Iterable[int] = range(len(self.copies))
        if not (torch.compiler.is_compiling() or is_recorded()) and picks.is_cpu:
            numbers = sorted({*picks.flatten().tolist()})  # elsewhere the answer would be waited for
        out: Any = None
        for number in numbers:
            own = self.copies[number](*args, **kwargs)
            chosen = (picks == number).unsqueeze(-1)
            out = pytree.tree_map(
                lambda y, other, rows=chosen: self._of(rows, y, other), own, own if out is None else out
            )
        return out

    def _of(self, rows: Tensor, y: Any, other: Any) -> Any:
        """``y`` in some rows, or tokens, and the other in the others."""
        if not isinstance(y, Tensor):
            return y
        rows = for_rows(self.lanes, self.site, rows, y.shape, y.shape).squeeze(-1)
        return torch.where(rows.view(*rows.shape, *(1 for _ in y.shape[rows.ndim :])), y, other)
