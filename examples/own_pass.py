"""A backend pass of one's own: attention that is written out becomes torch's fused one, and adapters go on swapping.

python examples/own_pass.py
"""

from __future__ import annotations

import math
import operator
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxpeft
from fxpeft.passes import BackendPass, Context, Report, RewriteResult
from fxpeft.testing import no_recompiles


class FuseAttention(BackendPass):
    """``softmax(q @ k.transpose(-2, -1) / scale, -1) @ v`` is ``scaled_dot_product_attention(q, k, v)``."""

    name = "fuse_attention"
    uuid = "fuse_attention 1"  # another one with every change here: torch keeps what it compiled by it

    def __call__(self, graph_module: GraphModule, *, context: Context) -> RewriteResult:
        """Fuse every attention of the graph; what they leave without a reader goes with them."""
        graph, fused = graph_module.graph, []
        for node in list(graph.nodes):
            found = _attention(node)
            if found is not None:
                query, key, value, scale = found
                with graph.inserting_before(node):
                    inputs = (query, key, value)
                    whole = graph.call_function(F.scaled_dot_product_attention, inputs, {"scale": scale})
                node.replace_all_uses_with(whole)
                fused.append(node.name)
        if fused:
            graph.eliminate_dead_code()
        return RewriteResult(graph_module, bool(fused), Report(self.name, tuple(fused)))


def _attention(node: Node) -> tuple[Node, Node, Node, float] | None:
    """Query, key, value and the factor of the scores where a node is the last product of an attention."""
    weights = node.args[0] if node.target is operator.matmul else None
    if not _calls(weights, "softmax", torch.softmax) or weights.kwargs.get("dim", weights.args[-1]) != -1:
        return None
    divided = weights.args[0]
    scores = divided.args[0] if _calls(divided, operator.truediv) else None
    turned = scores.args[1] if _calls(scores, operator.matmul) else None
    if not _calls(turned, "transpose") or turned.args[1:] != (-2, -1) or not isinstance(divided.args[1], float):
        return None
    return scores.args[0], turned.args[0], node.args[1], 1 / divided.args[1]


def _calls(value: object, *targets: object) -> bool:
    """Whether a value is a node that calls one of these, and nobody but the next step reads it."""
    return isinstance(value, Node) and value.target in targets and len(value.users) == 1


class Attention(nn.Module):
    """Attention as it is often written out."""

    def __init__(self, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Takes and gives ``[batch, length, hidden]``."""
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


def main() -> None:
    """Two adapters of different rank, swapped in a model that was compiled with the pass."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention()).eval()
    for name, rank in (("en", 4), ("de", 7)):
        config = fxpeft.LoraConfig(r=rank, lora_alpha=3, target_modules=["q", "v"], init_lora_weights=False)
        fxpeft.add_adapter(model, config, name)
    fxpeft.prepare_hotswap(model, max_rank=8, targets=["q", "v"])
    x, dump = torch.randn(2, 9, 32), Path(tempfile.mkdtemp())
    compiled = fxpeft.compile(model, passes=("fold_inactive", FuseAttention(), "clean"), dump=dump, fullgraph=True)
    with no_recompiles() as counted, torch.no_grad():
        for name in ("en", "de", "en"):
            fxpeft.set_adapter(model, name)
            torch.testing.assert_close(compiled(x), model(x))
        fxpeft.disable_adapters(model)
        torch.testing.assert_close(compiled(x), model(x))
    print(f"three swaps and off: {counted.graphs} graph compiled")
    for graph in sorted(dump.iterdir()):  # for slots in use, and for slots that hold nothing
        before, after = (next(graph.glob(f"*-fuse_attention-{when}.py")).read_text() for when in ("before", "after"))
        print(f"{graph.name}: {before.count('softmax(')} softmax before, {after.count('softmax(')} after")


if __name__ == "__main__":
    main()
