"""Live modules: the same rewrite on one module of a running model, bound back as its forward.

A module is traced on its own, its leaf graph is rewritten, and the generated code becomes the
``forward`` of a generated subclass of the module's own class. The instance is then moved to that
class, as torch's parametrize and FSDP2 do: names, hooks, ``isinstance`` and state_dict keys of the
base survive, and moving it back restores it exactly. Classes are cached by their source, so all
sites of one kind share one, and per-layer compilation keeps one graph.

A pickle of a bound module holds its source, which un-pickling runs, as un-pickling runs any code that a pickle
names: for files that you wrote, never for a stranger's.
"""

from fxpeft.passes.container import Container
from fxpeft.passes.live.bind import bare_copy, bind_source, lock_module, unbind, unlock_module
from fxpeft.passes.live.generated import _rebuild, generated_class, generated_source
from fxpeft.passes.live.instance import base_class, given_forward, is_bound
from fxpeft.passes.live.rewriting import feed_module, forward_text, replace_module, rewrite_module
from fxpeft.passes.live.signature import signature
from fxpeft.passes.live.tracing import base_weight, kind_of, target_of, trace_module

__all__ = [
    "Container", "_rebuild", "bare_copy", "base_class", "base_weight", "bind_source", "feed_module", "forward_text",
    "generated_class", "generated_source", "given_forward", "is_bound", "kind_of", "lock_module", "replace_module",
    "rewrite_module", "signature", "target_of", "trace_module", "unbind", "unlock_module",
]  # fmt: skip
