"""Layers that repeat: a few of each kind show what all of them do, so that a trace need not see the others.

Two layers are alike where their classes, tensors' shapes and plain attributes are, but for numbers that say which
layer it is. The first two and the last one of a kind are kept: what those three don't share is no matter of the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import join
from fxpeft.passes.live import Container, base_class, given_forward
from fxpeft.passes.live.signature import traced_attributes

T = TypeVar("T")
KINDS = 8  # of layers in one list; more have to be compared with too many others


@dataclass
class Repeats:
    """What can be left out of a copy of a model.

    Args:
        lists: name of a list of modules -> its children of each kind.
        dropped: the children that are left out.
    """

    lists: dict[str, list[list[str]]] = field(default_factory=dict)
    dropped: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, *, nested: bool = True) -> Repeats:
        """Those of a model.

        Args:
            nested: in lists that lie inside of a repeated layer, too, as a mixture's experts do.
        """
        found = cls()
        found._walk("", unwrap(model), nested)
        return found

    def _walk(self, name: str, module: nn.Module, nested: bool) -> None:
        children = dict(_children(module))
        kinds = _kinds(children) if isinstance(module, nn.ModuleList | nn.Sequential) else None
        repeated = kinds is not None and any(len(kept(kind)) < len(kind) for kind in kinds)
        if repeated:
            assert kinds is not None
            self.lists[name] = kinds
            stays = {key for kind in kinds for key in kept(kind)}
            self.dropped += [module._modules[key] for key in children if key not in stays]  # type: ignore[misc]
            children = {key: child for key, child in children.items() if key in stays}
        for key, child in children.items():
            if nested or not repeated:
                self._walk(join(name, key), child, nested)

    def name(self, short: str) -> str:
        """A name in the copy, whose lists are numbered anew, as it is in the model."""
        parts: list[str] = []
        for part in short.split("."):
            kinds = self.lists.get(".".join(parts))
            stays = sorted((key for kind in kinds for key in kept(kind)), key=int) if kinds and part.isdecimal() else []
            parts.append(stays[int(part)] if stays else part)
        return ".".join(parts)

    def expand(self, found: Mapping[str, T]) -> dict[str, T] | None:
        """What was found by name in the copy, for all of the model; ``None`` where layers of one kind differ in it."""
        out = dict(found)
        for place in sorted(self.lists, key=lambda name: -name.count(".")):  # the inner ones first
            below: dict[str, dict[str, T]] = {}
            start = f"{place}." if place else ""
            for site, value in out.items():
                if site.startswith(start):
                    key, _, rest = site[len(start) :].partition(".")
                    below.setdefault(key, {})[rest] = value
            for kind in self.lists[place]:
                shown = [below.get(key, {}) for key in kept(kind)]
                if len(kind) > len(shown) and any(each != shown[0] for each in shown):
                    return None
                for key in kind:
                    out.update({join(place, key, rest): value for rest, value in shown[0].items()})
        return out


def kept(kind: list[str]) -> list[str]:
    """The layers of a kind that stay."""
    return kind if len(kind) <= 3 else [*kind[:2], kind[-1]]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, Container):
            yield key, unwrap(child)


def _kinds(children: Mapping[str, nn.Module]) -> list[list[str]] | None:
    """The names of the children of each kind; ``None`` where a list can't do without any of them."""
    if list(children) != [str(number) for number in range(len(children))] or len({*children.values()}) < len(children):
        return None
    kinds: list[list[str]] = []
    for key, child in children.items():
        own = next((kind for kind in kinds if _alike(children[kind[0]], child, int(kind[0]), int(key))), None)
        if own is not None:
            own.append(key)
        elif len(kinds) == KINDS:
            return None
        else:
            kinds.append([key])
    return kinds


def _alike(one: nn.Module, other: nn.Module, at: int, there: int) -> bool:
    if base_class(one) is not base_class(other) or given_forward(one) or given_forward(other):
        return False
    for own, its in ((one._parameters, other._parameters), (one._buffers, other._buffers)):
        if [(k, _form(t)) for k, t in own.items()] != [(k, _form(t)) for k, t in its.items()]:
            return False
    own_values, its_values = dict(traced_attributes(one)), dict(traced_attributes(other))
    if own_values.keys() != its_values.keys():
        return False
    if not all(_same(value, its_values[name], at, there) for name, value in own_values.items()):
        return False
    children, its_children = dict(_children(one)), dict(_children(other))
    return children.keys() == its_children.keys() and all(
        _alike(child, its_children[key], at, there) for key, child in children.items()
    )


def _form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (type(tensor), tensor.shape, tensor.dtype)


def _same(one: Any, other: Any, at: int, there: int) -> bool:
    if one is other or (type(one) is type(other) is int and (one, other) == (at, there)):
        return True
    if type(one) is not type(other) or isinstance(one, nn.Module):
        return False
    if isinstance(one, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    if isinstance(one, Tensor):
        return bool(_form(one) == _form(other))
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - whatever comparing raises: they are not known to be the same
        return False
