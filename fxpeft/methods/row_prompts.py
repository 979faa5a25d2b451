"""Prompts of which the rows of a batch may have each its own."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxpeft.errors import AdapterError, short


class RowPrompts(NamedTuple):
    """Prompts of a batch whose rows have each its own.

    Args:
        values: ``[named, rows, width]``, of each row that was named; zeros for one that has none.
        there: ``[named, 1]``, whether it has one; ``None``: all have. A row without is masked where the others have
            theirs.
        repeats: how many rows of a call each may stand for, side by side.
    """

    values: Tensor
    there: Tensor | None
    repeats: int

    def of(self, batch: int) -> RowPrompts:
        """For so many rows.

        Raises:
            AdapterError: they are not those that were named.
        """
        named = self.values.shape[0]
        if batch == named:
            return self
        if batch != named * self.repeats:
            raise AdapterError(f"a prompt for each row: expected {named} rows, as they were named, found {batch}")
        values, there = (None if t is None else t.repeat_interleave(self.repeats, 0) for t in self[:2])
        assert values is not None
        return RowPrompts(values, there, 1)


class TaskPrompts(NamedTuple):
    """Prompts of several tasks, of which each row of a batch names one: what they share, times a matrix of the task's.

    Args:
        shared: ``[rows, width]``.
        cols, rows: of each task, ``[tasks, rows, ranks]`` and ``[tasks, ranks, width]``, whose product the matrix is.
    """

    shared: Tensor
    cols: Tensor
    rows: Tensor

    def of(self, tasks: Tensor | None) -> Tensor | RowPrompts:
        """For the tasks of a batch's rows, or one task for all of them; ``None``: there is but one task.

        Raises:
            AdapterError: no tasks where there are several, or no such task.
        """
        count = self.cols.shape[0]
        if tasks is None and count == 1:
            return self.shared * (self.cols[0] @ self.rows[0])
        if not isinstance(tasks, Tensor) or tasks.is_floating_point():
            raise AdapterError(
                f"task_ids: expected a tensor of each row's task, from 0 to {count - 1}, found {short(tasks)}"
            )
        ids = tasks.reshape(-1).to(self.cols.device)
        # elsewhere it would wait for the device
        on_cpu = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise AdapterError(f"task_ids: expected tasks from 0 to {count - 1}, found {short(ids.tolist())}")
        own = self.shared * (self.cols.index_select(0, ids) @ self.rows.index_select(0, ids))
        return own[0] if own.shape[0] == 1 else RowPrompts(own, None, 1)


class TokenPrompts(NamedTuple):
    """Virtual tokens that stand in a batch's rows already, as tokens whose ids say nothing.

    Args:
        values: ``[rows, tokens, width]``. there: ``[rows, tokens, 1]``, which tokens are such.
    """

    values: Tensor
    there: Tensor


#: one prompt ``[rows, width]`` for all rows of a batch, each row's own, or none
Prompt: TypeAlias = Tensor | RowPrompts | None
