"""The private torch APIs that fxpeft uses, and nothing else. Tried on torch 2.13."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
    set_fullgraph_compiled_frame_count,
)
from torch.fx import Graph, GraphModule
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer
from torch.utils.checkpoint import CheckpointFunction

FSDP = "_is_fsdp_managed_module"  # what FSDP1 and FSDP2 set on the modules whose parameters they come and go with
_CHECKPOINT = {CheckpointFunction.forward.__code__: False, CheckpointFunction.backward.__code__: True}


def import_block(names: dict[str, Any]) -> str:
    """Import statements that give the globals of a graph's generated code, for a fresh process."""
    return _format_import_block(names, sys_importer)


def skip_frame(function: Callable[..., Any], *, deep: bool = False) -> None:
    """Let Dynamo run calls of a function as they are; where it is inlined it is traced as any.

    Args:
        deep: what it calls too. Otherwise Dynamo begins there.
    """
    below = _FrameAction.SKIP if deep else _FrameAction.DEFAULT
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, below))


def count_waiting_call() -> None:
    """Let a call that waits before its first compiled frame pass for one that has had some.

    With ``fullgraph=True`` Dynamo counts a call's compiled frames, in one number for all threads that each call sets
    to zero first: while one waits, others that end find none and raise.
    """
    if set_fullgraph_compiled_frame_count(1) < 0:
        set_fullgraph_compiled_frame_count(-1)  # nobody counts


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != -1


def checkpoint_above(stop: CodeType) -> tuple[Any, bool] | None:
    """The context of the reentrant checkpoint that called, not past a caller that runs ``stop``; and if backward."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_code is not stop:
        if frame.f_code in _CHECKPOINT:
            return frame.f_locals["ctx"], _CHECKPOINT[frame.f_code]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def argument_names(graph: Graph) -> list[str]:
    """The names that a graph of nested arguments, as ``ExportedProgram.module()`` has one, gives its forward's."""
    nested = getattr(graph._codegen, "pytree_info", None)
    return [] if nested is None else list(nested.orig_args)


KEYED = "_fxpeft_passes"  # torch makes its key of all that a graph module holds, names that it doesn't know too


def key_graph(graph_module: GraphModule, passes: tuple[tuple[str, str | bytes], ...] | None) -> None:
    """Let torch keep what it compiles of a graph for later processes by these passes too; ``None``: not at all."""
    setattr(graph_module, KEYED, _Unkeyed() if passes is None else passes)


class _Unkeyed:
    """No key can be made of it: the caches on disk are passed by."""

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a pass without uuid changed this graph")

    def __deepcopy__(self, memo: object) -> _Unkeyed:
        return self
