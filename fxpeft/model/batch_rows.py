"""Which modules of a model see the rows of its batch, one by one and in their order: found in the traced data flow."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxpeft.errors import AdapterError
from fxpeft.model.repeats import Repeats
from fxpeft.model.trace import example_inputs, trace_model
from fxpeft.model.wrappers import named_modules, unwrap
from fxpeft.passes.targets.flow import operation, owner_of

_VIEWS = frozenset(
    {"view", "reshape", "unsqueeze", "expand", "to", "_to_copy", "alias", "detach", "clone", "lift_fresh_copy"}
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
    for node in graph.graph.nodes:
        if _moves_rows(graph, node, rows) or any(source in moved for source in node.all_input_nodes):
            moved.add(node)
        owner = owner_of(node)
        for source, site in _into(node, owner) if owner else ():
            shape = source.meta["val"].shape
            if not shape or shape[0] != rows:
                wrong = f"an input of {list(shape)} for a batch of {rows}"
            else:
                wrong = "rows that were picked or put in another order" if source in moved else ""
            found[site] = found.get(site) or wrong
    return found


def _into(node: Node, owner: str) -> Iterator[tuple[Node, str]]:
    """The tensors that come into a module at a node of its, or of a module inside, and that module's name."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" or not isinstance(source.meta.get("val"), Tensor):
            continue
        site, other = owner, f"{owner_of(source) or ''}."
        while site and not other.startswith(f"{site}."):
            yield source, site
            site = site.rpartition(".")[0]


def _moves_rows(graph: GraphModule, node: Node, rows: int) -> bool:
    """Whether an operation may put rows in another order. What is asked of truths, as of a mask's, moves none."""
    source = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, Node) else None
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dtype is torch.bool:
        return False
    if not value.ndim or value.shape[0] != rows:
        return False
    name, rest = operation(graph, node), node.args[1:]
    if name in ("index", "index_put"):
        picks = rest[0][0] if rest and isinstance(rest[0], list | tuple) and rest[0] else None
        return picks is not None and not _counts(graph, picks, rows)
    if name in ("flip", "roll"):
        dims = rest[-1] if rest else ()
        return any(d % value.ndim == 0 for d in dims) if isinstance(dims, list | tuple) else True
    if name in ("sort", "argsort", "topk"):
        dim = next((d for d in reversed(rest) if type(d) is int), node.kwargs.get("dim", -1))
        return name != "topk" and isinstance(dim, int) and dim % value.ndim == 0
    if name in ("index_select", "gather", "take_along_dim", "scatter", "index_add", "index_copy"):
        dim = rest[0] if rest else 0
        return not isinstance(dim, int) or dim % value.ndim == 0
    return False


def _counts(graph: GraphModule, picks: Any, rows: int) -> bool:
    """Whether numbers that pick rows are those of all rows in their order, as masks and pooled heads have them."""
    while isinstance(picks, Node) and operation(graph, picks) in _VIEWS and picks.all_input_nodes:
        picks = picks.all_input_nodes[0]
    return isinstance(picks, Node) and operation(graph, picks) == "arange" and picks.args[:2] in ((rows,), (0, rows))
