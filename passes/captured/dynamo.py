"""Graphs that Dynamo captured: which parameter each node carries, and operands that AOTAutograd finds."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import GraphModule, Node

from fxpeft.passes.base import attribute
from fxpeft.passes.meta import READS
from fxpeft.passes.targets.reading import calling_module
from fxpeft.passes.torch_private import ConstantSource, parameter_sources

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\.(\w+)|\[(\d+)\]")


def source_name(node: Node) -> str | None:
    """Where Dynamo found a placeholder's tensor, as Python source; ``None`` where that isn't known."""
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    return None if source is None else str(source.name() if callable(source.name) else source.name)


def parameter_path(source: str) -> str | None:
    """The dotted name, below the root module, of a parameter or buffer by its source; ``None`` for any other."""
    if not re.search(r"\._(parameters|buffers)\['\w+'\]$", source):
        return None
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source))


def annotate_sources(graph_module: GraphModule) -> dict[str, Any]:
    """Let the nodes of a graph that Dynamo captured know which parameters they carry.

    Returns:
        Dotted name -> the parameter or buffer, where it is not the graph module's own under that name.
    """
    examples: dict[str, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("L__"):
            path = _unmangle(node)
            if path is not None:
                examples[path] = attribute(graph_module, str(node.target))
        source = source_name(node) if node.op == "placeholder" else None
        path = None if source is None else parameter_path(source)
        if path is not None:
            READS.set(node, path)
            example = getattr(node.meta["grapharg"], "example", None)
            examples[path] = node.meta["example_value"] if example is None else example
    return examples


def name_operands(graph_module: GraphModule) -> None:
    """Give the tensors that passes brought the sources that AOTAutograd asks every one of a Dynamo graph for."""
    sources = parameter_sources(graph_module)
    if sources is None:
        return
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target)
            if hasattr(attribute(graph_module, path), "requires_grad"):
                sources.setdefault(path, ConstantSource(f"fxpeft_{re.sub(chr(92) + 'W', '_', path)}"))


def _unmangle(node: Node) -> str | None:
    """``torch._dynamo.export`` reads ``L__self___block_up_weight``: say which of the calling module's it is."""
    module = calling_module(node)
    mangled, target = re.sub(r"\W", "_", module), str(node.target)
    if module and f"__{mangled}_" in target:
        READS.set(node, f"{module}.{target.rpartition(f'__{mangled}_')[2]}")
        return READS.of(node)
    return None
