"""The operations that are targets, in one list."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.batched import BATCHED, GROUPED
from fxpeft.passes.targets.operations.conv import CONVOLUTION
from fxpeft.passes.targets.operations.embedding import EMBEDDING
from fxpeft.passes.targets.operations.linear import LINEAR
from fxpeft.passes.targets.operations.spec import OpSpec

#: The last one is asked first: linear takes any module with ``in_features`` and ``out_features``.
OPERATIONS: list[OpSpec] = [LINEAR, EMBEDDING, CONVOLUTION, BATCHED, GROUPED]


def register_operation(operation: OpSpec) -> None:
    """Make targets of an operation of your own too; before models are planned or rewritten.

    Raises:
        ValueError: another operation has one of its calls, or the name of its kind.
    """
    if operation in OPERATIONS:
        return
    taken = [call for call in operation.calls if operation_of(call) is not None]
    taken += [name for name in names_of(operation) if name in kind_names()]
    if taken:
        raise ValueError(f"there is an operation with {', '.join(map(str, taken))} already")
    OPERATIONS.append(operation)


def operation_of(call: Any) -> OpSpec | None:
    """The operation that a function or ATen overload is, or ``None``."""
    return next((operation for operation in OPERATIONS if operation.has(call)), None)


def module_operation(module: nn.Module) -> tuple[OpSpec, Kind] | None:
    """The operation that a module is where it is called as one node, and its kind; or ``None``."""
    for operation in reversed(OPERATIONS):
        kind = operation.of_module(module)
        if kind is not None:
            return operation, kind
    return None


def operation_of_kind(kind: Kind) -> OpSpec:
    """The operation that a kind belongs to."""
    return next(operation for operation in OPERATIONS if type(kind) is operation.kind)


def operation_named(name: str) -> OpSpec | None:
    """The operation of modules with a kind of that name, or ``None``."""
    return next((o for o in OPERATIONS if name in names_of(o) and not o.kind.is_parameter), None)


def names_of(operation: OpSpec) -> tuple[str, ...]:
    """What an operation's kinds are called."""
    return operation.names or (operation.kind.family,)


def kind_names() -> list[str]:
    """What kinds are called, one by one and together."""
    return list(dict.fromkeys(n for o in OPERATIONS for n in (o.kind.family, *names_of(o))))


def kinds() -> list[Kind]:
    """One kind of each operation, for what all of its kinds have in common."""
    return [operation.kind(1, 1) for operation in OPERATIONS]
