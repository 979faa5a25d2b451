"""torch's fused transformer encoder reads its children's weights and calls none of them: off while adapters run in it.

``nn.TransformerEncoderLayer`` computes one kernel from all its weights where it is in eval mode and no gradient is
asked for, and ``nn.TransformerEncoder`` packs padded inputs for that kernel. Both look at an attribute of theirs
first, which a generated subclass answers; see :mod:`fxpeft.passes.live`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from fxpeft.model.wrappers import submodule
from fxpeft.passes.live import bind_source, is_bound

# class -> the attribute that it asks, and the answer that switches the fast path off
SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_SOURCE = """def forward(self, *args, **kwargs):
    return type(self)._fxpeft_base.forward(self, *args, **kwargs)


members = {{
    {name!r}: property(lambda self: {off!r}, lambda self, value: vars(self).update({{{name!r}: value}})),
}}
"""


def fused_above(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The modules with such a fast path that have any of the named modules inside."""
    around = {name[:end] for name in names for end in (0, *(i for i, c in enumerate(name) if c == ".")) if name}
    found = ((name, submodule(model, name)) for name in sorted(around))
    return {name: module for name, module in found if is_fused(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether a module has such a fast path."""
    return isinstance(module, tuple(SWITCHES))


def switch_off(module: nn.Module) -> None:
    """Let a module compute with its children's own forwards; ``unbind`` undoes it. A bound one has one already."""
    if is_bound(module):
        return
    name, off = next(switch for cls, switch in SWITCHES.items() if isinstance(module, cls))
    bind_source(module, _SOURCE.format(name=name, off=off))
