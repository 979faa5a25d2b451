"""Which modules of a model see the rows of its batch, one by one and in their order: found in the traced data flow."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxpeft.errors import AdapterError
from fxpeft.model.repeats import Repeats
from fxpeft.model.trace import example_inputs, trace_model
from fxpeft.model.wrappers import named_modules, unwrap
from fxpeft.passes.targets.flow import operation, owner_of
from fxpeft.passes.torch_private import OpOverload, schema_of

_VIEWS = frozenset(
    {"view", "reshape", "unsqueeze", "expand", "to", "_to_copy", "alias", "detach", "clone", "lift_fresh_copy"}
)


_RESHAPES = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "view_as",
        "reshape_as",
        "_unsafe_view",
        "ravel",
    }
)
_PERMUTES = frozenset(
    {"permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"}
)


def other_rows(model: nn.Module, sites: Collection[str]) -> dict[str, str]:
    """Site -> what it sees in the place of the batch's rows, for those of the sites that don't see these.

    The model is traced with a number of rows that no tensor of it has as a size.

    Raises:
        AdapterError: it can't be traced.
    """
    model = unwrap(model)
    modules = list(named_modules(model, remove_duplicate=False))
    first = {module: name for name, module in reversed(modules)}
    names = {name: first[module] for name, module in modules}
    given = example_inputs(model)
    leading = next((v.shape[0] for v in (given or {}).values() if isinstance(v, Tensor) and v.ndim), None)
    tensors = (*model.parameters(), *model.buffers(), *(v for v in (given or {}).values() if isinstance(v, Tensor)))
    sizes = {size for tensor in tensors for size in tensor.shape}
    primes = (n for n in itertools.count(5, 2) if all(n % k for k in range(3, n, 2)))  # no product of other sizes
    rows = next(prime for prime in primes if prime not in sizes)
    inputs = None if given is None else {name: _resized(value, leading, rows) for name, value in given.items()}
    found = None
    for nested in (True, False):
        repeats = Repeats.of(model, nested=nested)
        try:
            short = _seen(trace_model(model, inputs, repeats.dropped), rows) if repeats.dropped else None
        except AdapterError:  # it may not run without some layers
            continue
        found = None if short is None else repeats.expand({repeats.name(site): seen for site, seen in short.items()})
        if found is not None:
            break
    if found is None:
        try:
            found = _seen(trace_model(model, inputs), rows)
        except AdapterError as error:
            raise AdapterError(
                f"whether each target sees the rows of a batch can't be told: {str(error).splitlines()[0]}\n"
                "give the model a dict `dummy_inputs` of what its forward takes, or name no rows (lanes=1)"
            ) from None
    seen = {names.get(site, site): what for site, what in found.items()}
    known = {site: seen.get(names.get(site, site), "no call of it with the model's example inputs") for site in sites}
    return {site: what for site, what in known.items() if what}


def _resized(value: Any, leading: int | None, rows: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != leading:
        return value
    return torch.empty(rows, *value.shape[1:], dtype=value.dtype, device="meta")


def _seen(graph: GraphModule, rows: int) -> dict[str, str]:
    """Module -> what is wrong with the rows of an input of its; nothing where they are the batch's."""
    found: dict[str, str] = {}
    moved: set[Node] = set()
    steps: dict[Node, int] = {}
    for node in graph.graph.nodes:
        if (step := _step(graph, node, rows, steps)) is not None:
            steps[node] = step
        if _moves_rows(graph, node, rows, steps) or any(source in moved for source in node.all_input_nodes):
            moved.add(node)
        owner = owner_of(node)
        for source, site in _into(node, owner) if owner else ():
            shape = source.meta["val"].shape
            if not shape or shape[0] != rows:
                wrong = f"an input of {list(shape)} for a batch of {rows}"
            else:
                other = source in moved or steps.get(source, prod(shape[1:])) != prod(shape[1:])
                wrong = "rows that were picked or put in another order" if other else _written(node, source)
            found[site] = found.get(site) or wrong
    return found


def _step(graph: GraphModule, node: Node, rows: int, steps: Mapping[Node, int]) -> int | None:
    """How many numbers of a tensor there are from one row of the batch to the next, in the tensor's own order.

    So the number at ``i`` is of row ``i // step % rows``, which views keep or change exactly: a tensor that begins with
    a dimension of so many rows has the batch's in their order where the step is the size of all others.

    Returns:
        ``None``: unknown. 0: there is no such step, the rows are torn apart.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    if node.op == "placeholder":
        return prod(shape[1:]) if shape and shape[0] == rows else None
    known = [(source, steps[source]) for source in node.all_input_nodes if source in steps]
    if node.op != "call_function" or not known:
        return None
    name, (first, step) = operation(graph, node), known[0]
    before = tuple(first.meta["val"].shape)
    if name in _RESHAPES and node.args[0] is first and prod(before) == prod(shape):
        return step
    if name in _PERMUTES and node.args[0] is first:
        at = _dimension(before, step, rows)
        return 0 if at is None else at[1] * prod(shape[_order(node, len(before)).index(at[0]) + 1 :])
    found = {_carried(name, node, tuple(source.meta["val"].shape), step, shape, rows) for source, step in known}
    return found.pop() if len(found) == 1 else None


def _written(node: Node, source: Node) -> str:
    """What is wrong where a module writes to its input, which is read again for other adapters."""
    target: Any = node.target
    writes = isinstance(target, OpOverload) and schema_of(target).is_mutable and node.args[:1] == (source,)
    return "an input that it writes to" if writes else ""


def _dimension(shape: Sequence[int], step: int, rows: int) -> tuple[int, int] | None:
    """The dimension in which the rows lie, and how far one is from the next there; ``None``: in no single one."""
    inner = 1
    for at in reversed(range(len(shape))):
        if step and step < inner * shape[at]:
            apart = step // inner
            return (at, apart) if step == apart * inner and shape[at] % (apart * rows) == 0 else None
        inner *= shape[at]
    return None


def _order(node: Node, ndim: int) -> list[int]:
    """For each dimension of a permuted tensor, which one it was."""
    function: Any = node.target
    sizes = list(range(2, ndim + 2))  # each dimension by a size of its own
    return [int(size) - 2 for size in function(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs).shape]


def _carried(
    name: str, node: Node, before: tuple[int, ...], step: int, shape: tuple[int, ...], rows: int
) -> int | None:
    """The step of what an operation makes of a tensor, where that is plain by their shapes."""
    if before == shape:
        return step
    if len(before) == len(shape) > 1 and before[:-1] == shape[:-1] and before[-1] and step % before[-1] == 0:
        return step // before[-1] * shape[-1]
    if (found := _dimension(before, step, rows)) is None:
        return None
    at, apart = found
    if name == "select" and type(node.args[1]) is int and len(shape) == len(before) - 1:
        at -= node.args[1] % len(before) < at
    if name == "expand":
        at += len(shape) - len(before)
    elif name != "select" and len(shape) != len(before):
        return None
    return apart * prod(shape[at + 1 :]) if at < len(shape) and shape[at] == before[found[0]] else None


def _into(node: Node, owner: str) -> Iterator[tuple[Node, str]]:
    """The tensors that come into a module at a node of its, or of a module inside, and that module's name."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" or not isinstance(source.meta.get("val"), Tensor):
            continue
        site, other = owner, f"{owner_of(source) or ''}."
        while site and not other.startswith(f"{site}."):
            yield source, site
            site = site.rpartition(".")[0]


def _moves_rows(graph: GraphModule, node: Node, rows: int, steps: Mapping[Node, int]) -> bool:
    """Whether an operation may put rows in another order. What is asked of truths, as of a mask's, moves none."""
    source = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, Node) else None
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dtype is torch.bool:
        return False
    if not value.ndim or not isinstance(source, Node):
        return False
    at = 0
    if value.shape[0] != rows:
        found = _dimension(value.shape, steps.get(source, 0), rows)
        if found is None or value.shape[found[0]] != rows:
            return False
        at = found[0]
    name, rest = operation(graph, node), node.args[1:]
    if name in ("index", "index_put"):
        picks = rest[0][at] if rest and isinstance(rest[0], list | tuple) and len(rest[0]) > at else None
        return picks is not None and not _counts(graph, picks, rows)
    if name in ("flip", "roll"):
        dims = rest[-1] if rest else ()
        return any(d % value.ndim == at for d in dims) if isinstance(dims, list | tuple) else True
    if name in ("sort", "argsort", "topk"):
        dim = next((d for d in reversed(rest) if type(d) is int), node.kwargs.get("dim", -1))
        return name != "topk" and isinstance(dim, int) and dim % value.ndim == at
    if name in ("index_select", "gather", "take_along_dim", "scatter", "index_add", "index_copy"):
        dim = rest[0] if rest else 0
        return not isinstance(dim, int) or dim % value.ndim == at
    return False


def _counts(graph: GraphModule, picks: Any, rows: int) -> bool:
    """Whether numbers that pick rows are those of all rows in their order, as masks and pooled heads have them."""
    while isinstance(picks, Node) and operation(graph, picks) in _VIEWS and picks.all_input_nodes:
        picks = picks.all_input_nodes[0]
    return isinstance(picks, Node) and operation(graph, picks) == "arange" and picks.args[:2] in ((rows,), (0, rows))
