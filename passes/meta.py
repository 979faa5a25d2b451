"""What passes write on nodes and graph modules: one key for one meaning, with the type of its value.

The values lie in ``node.meta`` under plain strings, so whatever copies a node copies them. They are names, numbers
and tensors, never other nodes: those of a copy are others. Keys of torch's own (``val``, ``nn_module_stack``, ...) are
not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Annotated(Protocol):
    """A node or a graph module."""

    meta: dict[str, Any]


@dataclass(frozen=True)
class MetaKey(Generic[T]):
    """One key of ``meta`` and the type of what stands there."""

    name: str

    def has(self, node: Annotated) -> bool:
        """Whether something stands there."""
        return self.name in node.meta

    def get(self, node: Annotated) -> T | None:
        """What stands there, or ``None``."""
        value: T | None = node.meta.get(self.name)
        return value

    def of(self, node: Annotated) -> T:
        """What stands there; ``KeyError`` where nothing does."""
        value: T = node.meta[self.name]
        return value

    def set(self, node: Annotated, value: T) -> None:
        """Write it."""
        node.meta[self.name] = value

    def drop(self, node: Annotated) -> T | None:
        """Take it off; returns what stood there."""
        value: T | None = node.meta.pop(self.name, None)
        return value


class Located(Protocol):
    """What the annotation of a target says; MatchPass writes a :class:`fxpeft.passes.Target`."""

    @property
    def site(self) -> str:
        """Dotted name of the module that owns the weight; ``""`` is the root itself."""

    @property
    def kind(self) -> Any:
        """Its linear algebra, a :class:`fxpeft.passes.Kind`."""

    @property
    def input(self) -> int:
        """Index of the node's argument that carries the activations."""


@dataclass(frozen=True)
class Origin:
    """What was done to the base node of a site; eject reads it. Names, not nodes: a copy keeps them.

    Args:
        rewrites: of its rewrites, in order. input: of the node that it took before.
        output: of the node that its users read now.
    """

    rewrites: tuple[str, ...]
    input: str
    output: str


# from what finds targets
TARGET = MetaKey[Located]("fxpeft.target")  #: on a target: where and what it is
ROLE = MetaKey[str]("fxpeft.role")  #: what a projection does in the data flow
READS = MetaKey[str]("fxpeft.reads")  #: on a placeholder: the dotted name of the parameter or buffer that it carries

# from what makes sites of them
ORIGIN = MetaKey[Origin]("fxpeft.origin")  #: on a site's base node: what it was
SITE = MetaKey[str]("fxpeft.site")  #: on a node that was made for a site: the name of its base node
REWRITE = MetaKey[tuple[str, ...]]("fxpeft.rewrite")  #: on a node that a rewrite made: the rewrites' names
OPERAND = MetaKey[bool]("fxpeft.operand")  #: on a read of an operand that an adapter brought
REDIRECT = MetaKey[str]("fxpeft.redirect")  #: on a read of an operand: the name of the read that it stands in for
CALL = MetaKey[tuple[str, ...]]("fxpeft.call")  #: on the one call of a module: names of what it was given
LIFTED = MetaKey[str]("fxpeft.lifted")  #: on a placeholder that was made for an operand: the operand's path
INPUTS = MetaKey[dict[str, Tensor]]("fxpeft.inputs")  #: on a graph module: what its argument ``adapters`` takes first
BODY = MetaKey[tuple[str, str | None]]("fxpeft.body")  #: on a read of a copied body: the read before, its call's name

# from what runs before Inductor
FOLDED = MetaKey[bool]("fxpeft.folded")  #: on a node that another one stands for now
GROUPED = MetaKey[tuple[str, ...]]("fxpeft.grouped")  #: on a placeholder that takes a stack: those whose A's are in it
