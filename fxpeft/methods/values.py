"""An adapter's tensors, each at its place in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Values:
    """The tensors of an adapter, each at its place in the model.

    Args:
        sites: site -> parameter name -> tensor, in the shapes of the method.
        saved: module -> key of its ``state_dict`` -> the adapter's own copy (``modules_to_save``).
        tensors: dotted parameter name in the base -> the adapter's own value (``bias``, ``weight``).
        shared: name -> tensor that all sites share (:meth:`~fxpeft.methods.base.Method.shared`).
        tokens: module -> the adapter's own rows of its weight (:mod:`fxpeft.methods.tokens`).
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"shared": {}, "tokens": {}, **state})  # older pickles have none

    def own(self) -> dict[str, dict[str, Tensor]]:
        """Module -> name of a parameter of the base there -> the adapter's own value of it."""
        found: dict[str, dict[str, Tensor]] = {}
        for path, value in self.tensors.items():
            owner, _, leaf = path.rpartition(".")
            found.setdefault(owner, {})[leaf] = value
        return found

    def flat(self) -> dict[tuple[str, str, str], Tensor]:
        """Every tensor: by which of the fields has it, the place there, and the name at that place."""
        found = {("sites", site, name): t for site, own in self.sites.items() for name, t in own.items()}
        found |= {("saved", path, key): t for path, own in self.saved.items() for key, t in own.items()}
        found |= {("tensors", path, ""): t for path, t in self.tensors.items()}
        found |= {("tokens", module, ""): t for module, t in self.tokens.items()}
        return found | {("shared", "", name): t for name, t in self.shared.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[tuple[str, str, str], Tensor]) -> Values:
        """The inverse of :meth:`flat`."""
        values = cls()
        for (field_name, place, name), value in flat.items():
            if field_name in ("tensors", "tokens"):
                getattr(values, field_name)[place] = value
            elif field_name == "shared":
                values.shared[name] = value
            else:
                getattr(values, field_name).setdefault(place, {})[name] = value
        return values

    def each(self, function: Callable[[Tensor], Tensor], *, sites: bool = True) -> Values:
        """The function of every tensor, at the same places, with or without those of the sites."""
        own = self.sites if sites else {}
        return Values(
            {site: {k: function(v) for k, v in parts.items()} for site, parts in own.items()},
            {path: {k: function(v) for k, v in parts.items()} for path, parts in self.saved.items()},
            {path: function(v) for path, v in self.tensors.items()},
            {name: function(v) for name, v in self.shared.items()},
            {module: function(v) for module, v in self.tokens.items()},
        )

    def clone(self, *, sites: bool = True) -> Values:
        """The same values in memory of their own, with or without those of the sites."""
        return self.each(lambda tensor: tensor.detach().clone(), sites=sites)
