"""Invocations in programs: which tokens of a call an adapter acts on is one more input, in the sizes of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fxpeft.errors import AdapterError, listing
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.programs.exported import USER
from fxpeft.programs.sites import Found

TOKENS = "input_ids"  # the name of a program's tokens, where it has several inputs of whole numbers


class ReachInput:
    """The input ``adapter_reach`` of a program, ``[rows, tokens]``, made where it is asked for.

    ``made``: it, where it was.
    """

    def __init__(self, program: ExportedProgram | GraphModule, graph_module: GraphModule) -> None:
        self.program, self.graph_module = program, graph_module
        self.made: Tensor | None = None
        self.like: Tensor | None = None

    def tensor(self) -> Tensor:
        """All tokens of the program's example.

        Raises:
            AdapterError: a GraphModule, which has no inputs to hide, or a program without tokens.
        """
        if not isinstance(self.program, ExportedProgram):
            raise AdapterError(
                "alora_invocation_tokens: a GraphModule isn't told which tokens of a call follow them, and has no "
                "input for it: export the model, whose program then takes adapter_reach"
            )
        node = tokens_of(self.program, self.graph_module)
        like: Tensor = node.meta["val"]
        shape = [int(size) if isinstance(size, int) else int(size.node.hint) for size in like.shape]
        self.like, self.made = like, torch.ones(shape, dtype=torch.bool, device=like.device)
        return self.made

    def sized(self) -> Sequence[tuple[Tensor, Tensor]]:
        """It, and the value whose sizes it has."""
        return [] if self.made is None or self.like is None else [(self.made, self.like)]

    def check(self, found: Mapping[str, Sequence[Found]], rewrites: Mapping[str, Sequence[Rewrite]]) -> None:
        """Refuse sites that don't see the tokens.

        Raises:
            AdapterError: which, and what they see.
        """
        if self.made is None or self.like is None:
            return
        rows, tokens = self.like.shape
        wrong = []
        for site, made in rewrites.items():
            if not any(self.made is operand for rewrite in made for operand in rewrite.operands.values()):
                continue
            for each in found[site]:
                source = each.node.args[each.target.input] if each.node.args else each.node.kwargs["input"]
                value: Any = source.meta.get("val") if isinstance(source, Node) else None
                leading = [] if value is None else list(value.shape[:-1])
                if not (_same(leading[:2], [rows, tokens]) or _same(leading, [rows * tokens])):
                    wrong.append(f"{site}: an input of {'unknown sizes' if value is None else list(value.shape)}")
        if wrong:
            raise AdapterError(
                f"alora_invocation_tokens: these targets don't see the {rows} x {tokens} tokens of the program:\n"
                f"{listing(wrong)}\nleave them out"
            )


def tokens_of(program: ExportedProgram, graph_module: GraphModule) -> Node:
    """The placeholder of a program's tokens, ``[rows, tokens]``.

    Raises:
        AdapterError: there is none, or several that none is named :data:`TOKENS` of.
    """
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is USER}
    nodes: list[Node] = [
        n for n in graph_module.graph.nodes if n.op == "placeholder" and n.name in users and _counts(n)
    ]
    named = [node for node in nodes if node.name == TOKENS] or nodes
    if len(named) != 1:
        raise AdapterError(
            f"alora_invocation_tokens: expected one input of tokens, [rows, tokens], or one named {TOKENS}, found "
            f"{', '.join(node.name for node in nodes) or 'none'}: an invocation is looked for in them"
        )
    return named[0]


def _counts(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim == 2


def _same(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether sizes are the same numbers, or sums and products of the same symbols."""
    return [str(size) for size in found] == [str(size) for size in wanted]
