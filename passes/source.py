"""A graph as source: what becomes code is checked first, whatever graph it came from.

torch.fx writes an attribute that is no identifier as ``getattr(x, "NAME")`` without escaping it, and
arguments' names as they are.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from fxpeft.passes.base import PassError
from fxpeft.passes.torch_private import argument_names, import_block

_PLAIN = re.compile(r"[\w-]+")


@dataclass(frozen=True, repr=False)
class Local:
    """A function of tensors that stands beside a graph's own code: an argument of a call there.

    Args:
        name: an identifier. graph: its placeholders are the arguments.
    """

    name: str
    graph: Graph

    def __repr__(self) -> str:
        return self.name  # what torch.fx writes


def graph_source(graph: Graph) -> str:
    """A graph's generated code with the imports it needs, and no more.

    Raises:
        PassError: it reads what is no plain dotted name, or a name in it would be code.
    """
    texts: list[str] = []
    used: dict[str, Any] = {}
    for local in _locals(graph):
        check_argument(local.name)
        texts.append(_code(local.graph, used).replace("def forward(self, ", f"def {local.name}(", 1))
    texts.append(_code(graph, used))
    return "\n\n".join([import_block(used), *texts]) + "\n"


def _locals(graph: Graph) -> Iterator[Local]:
    """The functions that a graph calls, each behind those that it calls itself."""
    for local in (a for node in graph.nodes for a in node.args if isinstance(a, Local)):
        yield from _locals(local.graph)
        yield local


def _code(graph: Graph, used: dict[str, Any]) -> str:
    """One graph's code; what it takes from elsewhere is added to ``used``."""
    check_names(graph)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            check_plain(str(node.target))
        node.type = None  # an annotation may be a string, which no import gives
    code = graph.python_code("self")
    used.update((name, value) for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src))
    return code.src.strip()


def check_plain(path: str) -> str:
    """A dotted path, each part of it letters, digits, ``_`` and ``-``, and no keyword of Python.

    Raises:
        PassError: it is none.
    """
    if not all(_PLAIN.fullmatch(atom) and not keyword.iskeyword(atom) for atom in path.split(".")):
        raise PassError(f"expected a plain dotted name where code reads it, found {_shown(path)}; rename the module")
    return path


def check_names(graph: Graph) -> None:
    """Refuse a graph with a name that torch.fx would write into its code as code.

    Raises:
        PassError: of a node, an argument, or an attribute that is read.
    """
    for node in graph.nodes:
        target = str(node.target)
        if not node.name.isidentifier():
            raise PassError(f"a node's name: expected an identifier, found {_shown(node.name)}")
        if node.op == "placeholder":
            check_argument(re.sub(r"^\*{1,2}", "", target))
        elif node.op in ("get_attr", "call_module"):
            check_path(target)
        elif node.op == "call_method":
            check_argument(target)
        for key in node.kwargs if node.op.startswith("call_") else ():
            check_argument(key)
    for name in argument_names(graph):
        check_argument(name)


def check_all_names(graph_module: GraphModule) -> None:
    """:func:`check_names` of a graph and of those of all bodies in it."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            check_names(module.graph)


def check_argument(name: str) -> None:
    """Refuse a name of an argument or method that is no identifier."""
    if not name.isidentifier() or (keyword.iskeyword(name) and name != "self"):
        raise PassError(f"the name of an argument: expected an identifier, found {_shown(name)}")


def check_path(path: str) -> None:
    """Refuse a dotted name that would end the quotes that torch.fx puts around a part of it."""
    if '"' in path or "\\" in path or not path.isprintable():
        raise PassError(
            f"the name of a module or tensor: expected no quotes, backslashes or control characters, found "
            f"{_shown(path)}; torch.fx would write it into code as it is. Rename it before it is captured"
        )


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 120 else f"{name[:120]!r}..."
