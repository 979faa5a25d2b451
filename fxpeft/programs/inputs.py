"""What a compiled program takes, written down when it is exported; compiled code looks at none of it.

It reads memory at the strides that it was compiled for and takes sizes, devices and flags on trust: what is
different gives wrong rows, or reads outside of the tensor. So whoever calls it fits the arguments first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from fxpeft.errors import AdapterError
from fxpeft.passes.torch_private import pytree, schema_of
from fxpeft.programs.exported import USER

_PLAIN = (bool, int, float, str, type(None))


def without_gaps(example: Any) -> Any:
    """An example input without gaps or overlaps in its memory, which is what a program can be exported for."""
    return pytree.tree_map_only(Tensor, lambda t: t if _order(t) is not None else t.contiguous(), example)


def describe(program: ExportedProgram) -> dict[str, Any]:
    """``inputs``: name, dtype, device, shape and memory order of each tensor; ``constants``: leaf -> its value.

    A size is a number; a symbol with its range; or a sum of symbols, each with a factor, and a number.

    Raises:
        AdapterError: a size that is no such sum.
    """
    specs = [s for s in program.graph_signature.input_specs if s.kind is USER]
    assert program.example_inputs is not None
    examples = pytree.tree_leaves(program.example_inputs)
    written = _written(program)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs, constants = [], {}
    for leaf, spec in enumerate(specs):
        value = nodes[spec.arg.name].meta.get("val")
        if isinstance(value, Tensor):
            inputs.append({
                "name": spec.arg.name, "dtype": str(value.dtype).removeprefix("torch."), "device": str(value.device),
                "shape": [_size(program, spec.arg.name, size) for size in value.shape], "order": _order(examples[leaf]),
                "written": spec.arg.name in written,
            })  # fmt: skip
        elif isinstance(spec.arg, ConstantArgument) and isinstance(spec.arg.value, _PLAIN):
            constants[str(leaf)] = spec.arg.value
    return {"inputs": inputs, "constants": constants}


def _written(program: ExportedProgram) -> set[str]:
    """The inputs that the program writes to, perhaps through views, which only a functional graph tells."""
    schemas = (schema_of(node.target) for node in program.graph.nodes)
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        return set()
    return set(program.run_decompositions({}).graph_signature.user_inputs_to_mutate.values())


def _size(program: ExportedProgram, name: str, size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    expression = sympy.expand(size.node.expr)
    bounds = program.range_constraints.get(size.node.expr)
    ends = {} if bounds is None else {"min": bounds.lower, "max": bounds.upper}
    span = {"min": None, "max": None} | {k: int(end) for k, end in ends.items() if end.is_Integer}
    if expression.is_Symbol:
        return {"symbol": str(expression), **span}
    terms = dict(expression.as_coefficients_dict())
    plus = terms.pop(sympy.Integer(1), 0)
    if not all(t.is_Symbol and f.is_Integer for t, f in terms.items()):
        raise AdapterError(
            f"input {name}: its size {size} is no sum of other sizes, which could not be checked when the package is "
            "called; say in dynamic_shapes how its dimensions depend on each other"
        )
    return {"terms": {str(t): int(f) for t, f in terms.items()}, "plus": int(plus), **span}


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost in memory; ``None`` where that has gaps or overlaps."""
    order = list(range(tensor.dim()))
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return order
    strides = tensor.stride()
    order.sort(key=lambda dim: -strides[dim])
    return order if tensor.permute(order).is_contiguous() else None


def fit(manifest: Mapping[str, Any], leaves: Sequence[Any], source: str) -> list[Tensor]:
    """The tensors among a call's arguments, in memory as the program was compiled for: copied where they are not.

    Raises:
        AdapterError: a tensor, its dtype, device, shape or layout, or another value that the program was not made for.
    """
    wanted, tensors = manifest["inputs"], [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) != len(wanted):
        raise AdapterError(f"{source}: expected {len(wanted)} tensors, found {len(tensors)}")
    for leaf, value in manifest.get("constants", {}).items():
        found = leaves[int(leaf)]
        if type(found) is not type(value) or found != value:
            raise AdapterError(
                f"{source}: argument {leaf}: it was exported for {value!r} alone, found {found!r}; package the model "
                "with other example_inputs"
            )
    sizes: dict[str, int] = {}
    wrong = {want["name"] for t, want in zip(tensors, wanted, strict=True) if not _fits(t, want, sizes)}
    for tensor, want in zip(tensors, wanted, strict=True):
        if want["name"] in wrong or not _sums(tensor, want, sizes):
            raise AdapterError(
                f"{source}: input {want['name']}: expected {want['dtype']} {_readable(want['shape'])}{_place(want)}, "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{_place(tensor)}; package the "
                "model with other example_inputs or dynamic_shapes"
            )
    return [_in_order(tensor, want, source) for tensor, want in zip(tensors, wanted, strict=True)]


def _fits(tensor: Tensor, want: Mapping[str, Any], sizes: dict[str, int]) -> bool:
    """Whether dtype, device and the sizes by themselves are right; ``sizes`` learns the symbols."""
    fits: bool = str(tensor.dtype) == f"torch.{want['dtype']}" and tensor.dim() == len(want["shape"])
    fits &= str(tensor.device) == want.get("device", str(tensor.device))
    for size, limit in zip(tensor.shape, want["shape"], strict=False):
        if not isinstance(limit, dict):
            fits &= limit is None or size == limit
            continue
        fits &= (limit["min"] or 0) <= size and (limit["max"] is None or size <= limit["max"])
        terms = limit["terms"] if "terms" in limit else {limit["symbol"]: 1}
        if len(terms) == 1:
            ((symbol, factor),) = terms.items()
            value, rest = divmod(size - limit.get("plus", 0), factor)
            fits &= not rest and sizes.setdefault(symbol, value) == value
    return fits


def _sums(tensor: Tensor, want: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether the sizes are the sums of others that they have to be."""
    for size, limit in zip(tensor.shape, want["shape"], strict=True):
        if isinstance(limit, dict) and len(terms := limit.get("terms", ())) > 1:
            known = all(symbol in sizes for symbol in terms)
            if not known or size != limit["plus"] + sum(f * sizes[symbol] for symbol, f in terms.items()):
                return False
    return True


def _in_order(tensor: Tensor, want: Mapping[str, Any], source: str) -> Tensor:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.layout is not torch.strided:
        raise AdapterError(
            f"{source}: input {want['name']}: expected a dense torch.Tensor, found {type(tensor).__name__} of layout "
            f"{str(tensor.layout).removeprefix('torch.')}"
        )
    order = want.get("order")
    if order is None:  # of a package whose manifest doesn't say
        return tensor
    inverse = sorted(range(len(order)), key=order.__getitem__)
    fitted = tensor.resolve_conj().resolve_neg().permute(order).contiguous().permute(inverse)
    if want.get("written") and fitted.data_ptr() != tensor.data_ptr():
        raise AdapterError(
            f"{source}: input {want['name']}: the program writes to it, so a copy in its order of memory would not do; "
            f"expected strides in the order {order} without gaps, found {list(tensor.stride())}"
        )
    return fitted


def _place(what: Mapping[str, Any] | Tensor) -> str:
    device = str(what.device) if isinstance(what, Tensor) else what.get("device", "cpu")
    return "" if device == "cpu" else f" on {device}"


def _readable(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(_readable_size, shape))}]"


def _readable_size(size: Any) -> str:
    if not isinstance(size, dict):
        return "any" if size is None else str(size)
    span = f"{size['min']}..{'' if size['max'] is None else size['max']}"
    if "terms" not in size:
        return span
    parts = [symbol if factor == 1 else f"{factor}*{symbol}" for symbol, factor in size["terms"].items()]
    return f"{' + '.join([*parts, str(size['plus'])] if size['plus'] else parts)} in {span}"
