"""Which nodes of a graph do more than compute their result."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from fxpeft.passes.torch_private import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of

_STATEFUL = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_INPLACE = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow,
    operator.imatmul, operator.ifloordiv, operator.imod, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift,
}  # fmt: skip


def may_write(node: Node) -> bool:
    """Whether a node may write to a tensor or change how later ones compute; where that can't be told, yes."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")  # add_, relu_
    if node.op == "call_method":
        return by_name or name == "__setitem__" or name.startswith("__i")
    if node.op != "call_function":
        return node.op == "call_module"
    if node.is_impure(impure_random=False):
        return True
    target: Any = node.target
    if isinstance(target, OpOverload):
        return bool(schema_of(target).is_mutable)
    if isinstance(target, OpOverloadPacket):
        return any(schema_of(getattr(target, overload)).is_mutable for overload in target.overloads())  # type: ignore[no-untyped-call]
    if isinstance(target, HigherOrderOperator):
        return True
    # an activation's ``inplace`` may be any of its arguments; a group is lost at most where it was another one
    return (
        by_name
        or name in _STATEFUL
        or target in _INPLACE
        or "out" in node.kwargs
        or any(argument is True for argument in (*node.args, *node.kwargs.values()))
    )
