"""Live modules: the same rewrite on one module of a running model, bound back as its forward."""

from fxpeft.passes.container import Container
from fxpeft.passes.live.asked import scale_argument, take_scale
from fxpeft.passes.live.bind import bare_copy, bind_source, change_class, lock_module, unbind, unlock_module
from fxpeft.passes.live.generated import _rebuild, generated_class, generated_source
from fxpeft.passes.live.instance import base_class, given_forward, is_bound
from fxpeft.passes.live.parameters import ReadPass
from fxpeft.passes.live.rewriting import feed_module, forward_text, replace_module, rewrite_module
from fxpeft.passes.live.signature import signature
from fxpeft.passes.live.tracing import base_weight, kind_of, target_of, trace_module

__all__ = [
    "Container", "ReadPass", "_rebuild", "bare_copy", "base_class", "base_weight", "bind_source",
    "change_class", "feed_module", "forward_text", "generated_class", "generated_source", "given_forward", "is_bound",
    "kind_of", "lock_module", "replace_module", "rewrite_module", "scale_argument", "signature", "take_scale",
    "target_of", "trace_module", "unbind",
    "unlock_module",
]  # fmt: skip
