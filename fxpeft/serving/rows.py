"""Rows and tokens of one batch with adapters of their own: ``with rows(model, ["a", None, {"a": 0.7, "b": 0.3}]):``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fxpeft.adapters.attach import check_together
from fxpeft.adapters.calls import RowsOfCalls
from fxpeft.adapters.change import changing
from fxpeft.adapters.state import ModelState, find_state, state_of
from fxpeft.errors import AdapterError, short
from fxpeft.methods import method_of
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import PassError
from fxpeft.passes.torch_private import skip_frame
from fxpeft.serving.apart import repeats_of, rows_apart
from fxpeft.serving.board import Board, Named, has_gains
from fxpeft.serving.guard import ModelLock
from fxpeft.serving.packing import settle
from fxpeft.serving.swap import Serving, reshow, serving_of, watch_reads
from fxpeft.serving.together import check_gains
from fxpeft.serving.tokens import check_alone

#: an adapter's name, names with weights, or none: ``None`` and PEFT's ``"__base__"``
Lane: TypeAlias = str | Mapping[str, float] | None
BASE = "__base__"


def rows(model: nn.Module, names: Sequence[Lane]) -> AbstractContextManager[None]:
    """Give each row of the batches that are called inside a ``with`` block adapters of its own.

    On a model that is prepared with ``lanes`` all rows run in one pass of one graph, whichever adapters they name, of
    whatever ranks and methods; naming others recompiles nothing. Inside the block the adapters that it names stay in
    the slots; another version of one (``hotswap``, ``set_scale``) is seen by the next call. The block is its thread's,
    or its task's in an event loop: calls of others don't see it.

    On a model without slots each of its targets takes the rows adapter by adapter, called without a compiler, as
    PEFT's ``adapter_names``; heads of ``modules_to_save`` too. Until the block ends its adapters can't be changed, and
    every thread sees it. The active adapters play no part in either.

    Args:
        names: for each row an adapter's name; names with weights, which add up: ``{"a": 0.7, "b": 0.3}``, or
            ``{"a": 0.5}``, an adapter at half its scale; or ``None``, the base alone.

    Raises:
        AdapterError: an unknown name, one that rows can't have, or more adapters at once than there are lanes or
            ranks; without slots also a weight other than 1, or a model in training. Nothing was changed.
        LockError: an adapter that isn't in the slots yet is named inside a forward or hold of the same thread.
    """
    named, bare = _named_rows("rows", names), unwrap(model)
    if (state := find_state(bare)) is not None and state.serving is None:
        return rows_apart(bare, named)
    model, board = _prepared(model)
    return _naming(model, board, named)


def tokens(
    model: nn.Module, names: Sequence[Sequence[Lane]], virtual: Sequence[Sequence[int]] | None = None
) -> AbstractContextManager[None]:
    """Give each token adapters of its own, as :func:`rows` does each row.

    That is for batches that hold several requests in one row, as those of continuous batching, ``[1, tokens]``.

    Args:
        names: for each row, for each of its tokens, what :func:`rows` takes for a row; as many for every row.
        virtual: where one of them has a soft prompt of embeddings: for each token its place in the prompt of what it
            names, or -1 for a token of text. Tokens of a prompt stand before their request's own, with any id.

    Raises:
        AdapterError, LockError: as :func:`rows`.
    """
    model, board = _prepared(model)
    found = [] if isinstance(names, str | Mapping) or not isinstance(names, Sequence) else list(names)
    if not found or any(isinstance(row, str | Mapping) or not isinstance(row, Sequence) for row in found):
        raise AdapterError(f"tokens: expected a sequence of names for each row, found {short(names)}")
    counts = [len(row) for row in found]
    if len(set(counts)) > 1 or not counts[0]:
        raise AdapterError(f"tokens: expected a name for every token, as many in each row, found {short(counts)}")
    mixtures, ids = _numbered([name for row in found for name in row])
    places = None
    if virtual is not None:
        if [len(row) for row in virtual] != counts or any(type(place) is not int for row in virtual for place in row):
            raise AdapterError(
                f"virtual: expected an integer for every token, as names has them, found {short(virtual)}"
            )
        places = torch.tensor([list(row) for row in virtual])
    return _naming(model, board, Named(mixtures, torch.tensor(ids).view(len(found), -1), virtual=places))


def _prepared(model: nn.Module) -> tuple[nn.Module, Board]:
    model = unwrap(model)
    board = serving_of(state_of(model)).board
    if board is None:
        raise AdapterError(
            "rows of their own adapters need lanes: prepare_hotswap(model, lanes=8) for up to eight adapters at once, "
            "before compiling (after release_hotswap, where the model is prepared without)"
        )
    return model, board


def _named_rows(what: str, names: Sequence[Lane]) -> Named:
    if isinstance(names, str | Mapping) or not isinstance(names, Sequence) or not names:
        raise AdapterError(f"{what}: expected a name, names with weights, or None for each row, found {short(names)}")
    mixtures, ids = _numbered(names)
    return Named(mixtures, torch.tensor(ids))


def _numbered(names: Sequence[Lane]) -> tuple[list[dict[str, float]], list[int]]:
    """The different ones among the lanes that are named, and the number of each one's."""
    mixtures: dict[tuple[tuple[str, float], ...], int] = {}
    ids = [mixtures.setdefault(tuple(sorted(mixture(name).items())), len(mixtures)) for name in names]
    return [dict(items) for items in mixtures], ids


def mixture(name: Lane) -> dict[str, float]:
    """The adapters that a row names, with their weights; empty for none.

    Raises:
        AdapterError: it is nothing that a row can name.
    """
    if name is None or name == BASE:
        return {}
    if isinstance(name, str):
        return {name: 1.0}
    if not isinstance(name, Mapping) or not all(isinstance(key, str) for key in name):
        raise AdapterError(f"a row: expected an adapter's name, names with weights, or None, found {short(name)}")
    found: dict[str, float] = {}
    for key, weight in name.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise AdapterError(f"a row: {key}: expected a finite number as its weight, found {short(weight)}")
        if weight:
            found[key] = float(weight)
    return found


@contextmanager
def _naming(model: nn.Module, board: Board, named: Named) -> Iterator[None]:
    names, block = named.names(), object()
    serving = serving_of(state_of(model))
    try:
        with serving.lock.read():  # no swap looks at the pins meanwhile
            check_named(state_of(model), board, named)
            board.pins[block] = names
            missing = [name for name in names if name not in board.placed]
        if missing:
            _take(model, serving, board, names)
        board.touch(names)
        watch_reads(serving)
        with board.naming(named, serving.lock):
            yield
    finally:
        board.pins.pop(block, None)


def _take(model: nn.Module, serving: Serving, board: Board, names: Sequence[str]) -> None:
    with changing(model):
        state = state_of(model)
        wanted = [state.get(name) for name in names]
        board.take(serving.shown, wanted, serving.max_rank)
        for adapter in board.beside:
            if not adapter.settled:
                settle(adapter, serving.slots)
        try:
            reshow(model, serving, serving.shown)
        except PassError as error:
            raise AdapterError(str(error)) from None


def _of_call(model: nn.Module, names: Sequence[Lane] | None, generate: tuple[Any, Any] | None = None) -> Any:
    """Give the rows of one call of a locked module adapters of their own.

    Args:
        names: as in :func:`rows`; ``None``: those that the caller's block names.
        generate: arguments of a ``generate``, whose beams and sequences of one row are rows side by side.
    """
    state = find_state(model)
    board = None if state is None or state.serving is None else serving_of(state).board
    if board is None:
        raise AdapterError(f"adapter_names: expected a call of the whole model, found one of a {type(model).__name__}")
    repeats = 1 if generate is None else repeats_of(model, *generate)
    if names is not None:
        named = _named_rows("adapter_names", names)
    elif (given := board.named()) is None or repeats == given.repeats:
        return nullcontext()
    else:
        named = given
    return _naming(model, board, replace(named, repeats=repeats))


ModelLock.naming = staticmethod(_of_call)
for _function in (_of_call, _naming.__wrapped__):  # type: ignore[attr-defined]
    skip_frame(_function, deep=True)  # Dynamo begins behind them


def _apart(model: nn.Module, names: Sequence[Lane]) -> AbstractContextManager[None]:
    """Give the rows of one call of a model without slots adapters of their own."""
    return rows_apart(model, _named_rows("adapter_names", names))


RowsOfCalls.naming = staticmethod(_apart)


def check_named(state: ModelState, board: Board, named: Named) -> None:
    """Refuse what rows can't have.

    Raises:
        AdapterError: which row names it, and why.
    """
    names = named.names()
    for name in names:
        board.check_rows_take(state.get(name))
    state.check_unfolded(names, "rows can't name it")
    for adapter in state.running():
        board.check_rows_take(adapter)
    prompts = [name for name in names if state.get(name).prompt is not None]
    if named.ids.ndim > 1:
        _check_virtual(board, named, prompts)
    bare = next((m for m in named.mixtures if m.keys().isdisjoint(prompts)), None) if prompts else None
    if named.ids.ndim == 1 and bare is not None and board.prompts is not None and board.prompts.alone:
        raise AdapterError(
            f"rows: {', '.join(bare) or None} has no prompt, and {prompts[0]} has one: beside it a row without can't "
            f"be masked where the prompt is, since {board.prompts.alone}; call the model once for each"
        )
    for mixture in named.mixtures:
        together = [state.get(name) for name in mixture]
        check_together(together)
        check_gains(together)
        check_alone(together)
        if any(a.plan.tokens for a in together) and sum(map(has_gains, together)) > 1:
            raise AdapterError(
                f"a row: {', '.join(mixture)}: one has rows of an embedding, and another such rows or gains: a row has "
                "those of one alone"
            )
        for name, weight in mixture.items():
            adapter = state.get(name)
            if weight != 1 and has_gains(adapter):
                raise AdapterError(
                    f"a row: {name}: expected the weight 1, found {weight:g}: its "
                    f"{'rows of an embedding' if adapter.plan.tokens else 'gains'} ({method_of(adapter.config).name}) "
                    "don't grow with a scale"
                )


def _check_virtual(board: Board, named: Named, prompts: Sequence[str]) -> None:
    """Refuse tokens of prompts that aren't there.

    Raises:
        AdapterError: what of them, and why.
    """
    virtual = named.virtual
    if prompts and board.prompts is not None and board.prompts.plan.prefix:
        raise AdapterError(
            f"tokens: {prompts[0]}: a prompt stands before a whole row, and of keys and values no token can stand for "
            "one of it: use rows"
        )
    if virtual is None:
        if prompts:
            raise AdapterError(
                f"tokens: {prompts[0]}: a prompt stands before a whole row, tokens can't name it unless virtual says "
                "which of them are its: use rows"
            )
        return
    if virtual.shape != named.ids.shape:
        raise AdapterError(f"virtual: expected {list(named.ids.shape)}, as names, found {list(virtual.shape)}")
    most = -1 if board.prompts is None else board.prompts.plan.rank - 1
    low, high = (int(found) for found in (virtual.min(), virtual.max()))
    if low < -1 or high > most:
        raise AdapterError(f"virtual: expected places from -1 to {most}, found {low if low < -1 else high}")
    for number in set(named.ids[virtual >= 0].tolist()):
        if named.mixtures[number].keys().isdisjoint(prompts):
            name = ", ".join(named.mixtures[number]) or None
            raise AdapterError(
                f"virtual: a token that names {name} can't stand for one of a prompt, which that has not"
            )
