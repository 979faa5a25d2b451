"""An adapter's tensors, each at its place in a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Values:
    """The tensors of an adapter, each at its place in the model.

    Args:
        sites: site -> parameter name -> tensor, in the shapes of the method.
        saved: module -> key of its ``state_dict`` -> the adapter's own copy (``modules_to_save``).
        tensors: dotted parameter name in the base -> the adapter's own value (``bias``, ``weight``).
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def own(self, site: str) -> dict[str, Tensor]:
        """Parameter name -> the adapter's own value of the base's parameters at a site."""
        return {p.rpartition(".")[2]: v for p, v in self.tensors.items() if p.rpartition(".")[0] == site}

    def clone(self, *, sites: bool = True) -> Values:
        """The same values in memory of their own, with or without those of the sites."""
        own = self.sites if sites else {}
        return Values(
            {site: {k: v.detach().clone() for k, v in parts.items()} for site, parts in own.items()},
            {path: {k: v.detach().clone() for k, v in parts.items()} for path, parts in self.saved.items()},
            {path: v.detach().clone() for path, v in self.tensors.items()},
        )
