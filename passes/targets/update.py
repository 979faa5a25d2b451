"""The update of a slot of a matrix, in the form that suits the rows of its input: sums for one row, products for more.

A decode step multiplies one row. Inductor calls a library for a product, once for each factor, and makes a sum
itself, in one kernel with what stands around it: the scale, the mask of the ranks that are off, the sum with the base,
the next norm. For more rows than one the library's products win.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpeft.passes.targets.one_node import one_node


@one_node
def update(x: Tensor, a: Tensor, b: Tensor, d: Tensor, masked: bool = True) -> Tensor:
    """``[..., in]`` to ``[..., out]``: what the ranks of A ``[r, in]``, B ``[r, out]`` and d ``[r]`` add to the output.

    Compiled, one row takes the form of one: Dynamo makes a constant of a size of one in any case, so there is no guard
    that asks for it. As it is called, products have the fewest calls.

    Args:
        masked: whether any of d may be zero.
    """
    if torch.compiler.is_compiling() and is_row(x.shape[:-1]):
        return update_row(x, a, b, d)
    return update_rows(x, a, b, d, masked)


def is_row(leading: torch.Size) -> bool:
    """Whether tensors with these sizes before their features hold one row, as far as that is known without a guard."""
    return all(statically_known_true(size == 1) for size in leading)


@one_node
def update_rows(x: Tensor, a: Tensor, b: Tensor, d: Tensor, masked: bool = True) -> Tensor:
    """:func:`update` as two products.

    The second is not ``addmm``, which would save a sum: Inductor (torch 2.13) asks it whether the rank is at most 16,
    and the rank would be symbolic no longer.
    """
    h = F.linear(x if x.dtype is a.dtype else x.type_as(a), a)
    scaled = h * d
    h = scaled if scaled.dtype is h.dtype else scaled.type_as(h)
    # a rank that is off adds nothing to any input, and 0 * inf were NaN: chosen, not multiplied away
    return torch.matmul(torch.where(d == 0, 0, h) if masked else h, b)


@one_node
def update_row(x: Tensor, a: Tensor, b: Tensor, d: Tensor, masked: bool = True) -> Tensor:
    """:func:`update` as two sums, in float32 where A and B are narrower; whoever adds it to an output rounds it."""
    wide = torch.promote_types(a.dtype, torch.float32)
    h = (x.to(wide).unsqueeze(-2) * a.to(wide)).sum(-1) * d
    h = torch.where(d == 0, 0, h)  # as above; it costs no kernel here
    return (h.to(wide).unsqueeze(-1) * b.to(wide)).sum(-2)
