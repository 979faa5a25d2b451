"""A live module in; out, the stored weight and bias of its one product, as views that a fold can write to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from fxpeft.passes.base import PassError
from fxpeft.passes.live.instance import base_class, given_forward
from fxpeft.passes.live.signature import signature
from fxpeft.passes.live.tracing import trace_module
from fxpeft.passes.meta import TARGET
from fxpeft.passes.recent import Recent
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.match import operands, stored_weight
from fxpeft.passes.targets.operations.registry import OPERATIONS

_products: Recent[tuple[Any, ...], Product] = Recent()


class Product(NamedTuple):
    """What a module's product reads.

    Args:
        weight: the attribute's name. flip: whether it is stored ``[in, out]``.
        bias: the attribute's name, or ``None`` where the product adds nothing.
    """

    kind: Kind
    weight: str
    flip: bool
    bias: str | None

    def view(self, stored: Tensor) -> Tensor:
        """A stored weight as ``[out, in, ...]``, or that as it is stored."""
        return stored.t() if self.flip else stored


def product_of(module: nn.Module) -> Product:
    """The product of a module that can be changed by writing to its weight and its bias.

    Raises:
        PassError: there is none: no target, a weight that is quantised, computed, elsewhere or read
            for something else too, or a forward that torch.fx can't look into.
    """
    key = signature(module)
    product = _products.recent(key) if key else None
    if product is None:
        product = _read(module)
        if key:
            _products[key] = product
    for leaf in (product.weight, product.bias):
        if leaf is not None:
            check_stored(module, leaf)
    return product


def _read(module: nn.Module) -> Product:
    traced = trace_module(module)
    node = next(n for n in traced.graph.nodes if TARGET.has(n))
    # forwards that torch.fx may not look into and that are nothing but the product of their kind
    stock = {cls.forward for operation in OPERATIONS for cls in operation.modules}
    if node.op == "call_module" and (given_forward(module) or base_class(module).forward not in stock):
        name = base_class(module).__name__
        raise PassError(f"torch.fx can't look into {name}.forward, which may do more with its weight than one product")
    found, flip = stored_weight(traced, node)
    weight, bias = _own_name(module, traced, found), operands(traced, node)[2]
    return Product(TARGET.of(node).kind, weight, flip, None if bias is None else _own_name(module, traced, bias))


def _own_name(module: nn.Module, traced: GraphModule, found: Node | str) -> str:
    """The name of the attribute that an operand is read from, where it is read for nothing else."""
    name = base_class(module).__name__
    if isinstance(found, str):
        return found.rpartition(".")[2]
    if found.op != "get_attr":
        raise PassError(f"{name}.forward computes an operand of its product, so writing would change something else")
    path = str(found.target)
    if "." in path:
        raise PassError(f"{name}.forward reads {path}, which is no attribute of its own")
    if _uses(traced.graph, path) != 1:
        raise PassError(f"{name}.forward reads its {path} for something else than its product too")
    return path


def check_stored(module: nn.Module, leaf: str) -> None:
    """Refuse a tensor of a module that can't be written to: computed, quantised, offloaded, in parts."""
    name = base_class(module).__name__
    tensor = {**module._parameters, **module._buffers}.get(leaf)
    if tensor is None or hasattr(base_class(module), leaf):
        raise PassError(f"{name}.{leaf} is not stored but computed when it is read; remove its parametrization first")
    if hasattr(tensor, "placements"):
        raise PassError(f"{name}.{leaf} is here in part: fold into a model that one process holds, and save that")
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        found = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
        raise PassError(f"expected a plain floating-point tensor, {name}.{leaf} is a {found}: dequantise it first")
    if tensor.is_meta:
        raise PassError(f"{name}.{leaf} is offloaded (on the meta device); load the model without offloading")


def _uses(graph: fx.Graph, path: str) -> int:
    """How often a graph computes with an attribute; asking for its dtype or shape is no computation."""
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target == path]
    return sum(user.target not in (getattr, "size", "dim") for read in reads for user in read.users)
