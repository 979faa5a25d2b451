"""The universal slot: static placeholders at one site that any lowered adapter is copied into.

    y = g_out * (base(x') + expand(reduce(x', A[:r]) * d[:r], B[:r]) + (W1 kron W2) x') + shift
    x' = (g_in * x) (I + R)

g_in, g_out, shift, the rotation R of blocks (:mod:`fxpeft.passes.slots.rotation`), W1 and W2
(:mod:`fxpeft.passes.slots.kronecker`) are there where the slot was made for methods that need them;
without them the graph holds no trace of them. A, B and d hold ``max_rank`` ranks, rank first. In
*dynamic* mode the subgraph narrows them to the rank in use, which it reads as the *size* of a carrier
tensor: a size is symbolic in a compiled graph, so one graph serves every rank and does only that
rank's work. In *static* mode all ranks are computed, and the unused ones are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fxpeft.passes.container import Container
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots import kronecker
from fxpeft.passes.slots.reach import ReachAt, reached
from fxpeft.passes.slots.room import Room, Span
from fxpeft.passes.slots.rotation import BLOCK, block_of, rotated
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.one_node import one_node
from fxpeft.passes.torch_private import is_recorded, mark_dynamic, version_of

Ranks: TypeAlias = tuple[Tensor, Tensor, Tensor, bool]
#: name -> what is in a slot that holds nothing
FEATURES = {"g_in": 1, "g_out": 1, "shift": 0, "rotation": 0, "w1": 0, "w2": 0}
MULTIPLY = frozenset(("g_in", "g_out", "rotation"))  # those that multiply what others add, or are given
LANE = "lane_"  # begins the name of a feature of each lane
NEUTRAL = {"d": 0, **FEATURES}
NEUTRAL |= {LANE + name: NEUTRAL[name] for name in FEATURES}
# float32 whatever the model's dtype: alpha / rank in bfloat16 would be off by up to 0.4%
EXACT = tuple(name for name in NEUTRAL if not name.endswith(("rotation", *kronecker.KRONECKER)))
CARRIER = ".carrier"  # where a program's slots read the active rank, in the place of an ActiveRank
REACH = ".reach"  # where sites of a program read which of its tokens they act on, in the place of a ReachAt
LEAST = 2  # Dynamo specialises sizes 0 and 1, so ranks start at 2; rank 1 is padded


class ActiveRank:
    """The rank in use, as the size of ``carrier``, shared by all slots of a model.

    A plain object on purpose: Dynamo specialises tensors and ints that it finds on a module, and
    this one it keeps symbolic.
    """

    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.set(LEAST)

    def set(self, rank: int) -> int:
        """Make ``rank`` the active one, at least :data:`LEAST`; returns what was set."""
        rank = max(rank, LEAST)
        with torch.inference_mode(False):  # to Dynamo a tensor of inference mode is another kind
            carrier = torch.empty(rank, 0, dtype=torch.float32)
        if self.max_rank > LEAST:
            mark_dynamic(carrier, 0, LEAST, self.max_rank)
        self.rank, self.carrier = rank, carrier
        return rank

    def __getstate__(self) -> tuple[int, int]:
        return self.max_rank, self.rank

    def __setstate__(self, state: tuple[int, int]) -> None:
        self.max_rank = state[0]
        self.set(state[1])  # a pickled tensor would have lost its mark


class Slot(Container):
    """One site's placeholders, as buffers that no ``state_dict`` holds.

    Args:
        kind: the site's kind.
        rank: the model's active rank, or ``None`` for static mode.
        features: which of ``g_in`` [in], ``g_out`` [out], ``shift`` [out], ``rotation`` [blocks, size, size], ``w1``
            [o1, i1] and ``w2`` [o2, i2, *kernel] it has.
        memory: its tensors by name, of zeros, and the room where they lie. Default: memory of its own.
        lanes: a ``Lanes``, of a model whose rows may have adapters of their own; see :mod:`fxpeft.passes.slots.lanes`.
        site: the site's name, for messages.
        reach: of a model that was declared for adapters which act on some tokens of a call.
        block: how many inputs a block of the rotation has; where that doesn't divide them, the nearest that does.
        factor: by which outputs and inputs are taken apart for ``w1`` and ``w2``, as PEFT's ``decompose_factor``.

    ``idle`` says that it holds nothing, so that a graph without it may run; whoever writes slots keeps it true.
    """

    a: Tensor
    b: Tensor
    d: Tensor
    g_in: Tensor
    g_out: Tensor
    shift: Tensor
    rotation: Tensor
    w1: Tensor
    w2: Tensor
    lane_g_in: Tensor  # with lanes: [lanes + 1, in], and so on
    lane_g_out: Tensor
    lane_shift: Tensor
    lane_rotation: Tensor
    lanes: Any
    reach: ReachAt | None

    def __init__(
        self,
        kind: Kind,
        max_rank: int,
        rank: ActiveRank | None,
        *,
        features: Collection[str] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        memory: tuple[Room, Mapping[str, Tensor]] | None = None,
        lanes: Any = None,
        site: str = "",
        reach: ReachAt | None = None,
        block: int = BLOCK,
        factor: int = -1,
    ) -> None:
        super().__init__()
        self.kind, self.rank, self.idle = kind, rank, False
        self.lanes, self.site, self.reach = lanes, site, reach
        self.windows: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.stacks: tuple[Any, ...] = ()  # what compiled code reads in the place of several slots' A's
        self.kept: Kept | None = None  # what a call that is not compiled reads
        self.room: Room | None = memory[0] if memory else None
        given = memory[1] if memory else {}
        shapes = self.shapes(kind, max_rank, features, 1 if lanes is None else lanes.count, block, factor)
        self.features = tuple(name for name in FEATURES if name in shapes)
        for name, shape in shapes.items():
            value = given.get(name)
            if value is None:
                value = torch.zeros(shape, device=device, dtype=torch.float32 if name in EXACT else dtype)
            if NEUTRAL.get(name):
                value.fill_(NEUTRAL[name])
            self.register_buffer(name, value, persistent=False)
        self._announce()

    @staticmethod
    def shapes(
        kind: Kind, max_rank: int, features: Collection[str] = (), lanes: int = 1, block: int = BLOCK, factor: int = -1
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of a slot's placeholders; of several lanes' features a row each, and a neutral one."""
        takes = {"g_in": kind.takes_gain, "g_out": True, "shift": kind.takes_bias, "rotation": kind.takes_rotation}
        takes |= dict.fromkeys(kronecker.KRONECKER, kind.takes_kronecker)
        into, out, size = kind.in_features, kind.out_features, block_of(kind.in_features, block)
        sizes: dict[str, tuple[int, ...]]
        sizes = {"g_in": (into,), "g_out": (out,), "shift": (out,), "rotation": (into // size, size, size)}
        if "w1" in features:
            sizes["w1"], sizes["w2"] = kronecker.shapes(kind, factor)
        a, b = kind.slot_shapes(max_rank)
        own = [name for name in FEATURES if name in features and takes[name]]
        shapes = {"a": a, "b": b, "d": (max_rank,), **{name: sizes[name] for name in own}}
        return shapes if lanes == 1 else shapes | {LANE + name: (lanes + 1, *shapes[name]) for name in own}

    def window(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of some ranks of A, B and d, kept: making three costs more than copying a small adapter."""
        key = (start, count)
        if key not in self.windows:
            if len(self.windows) > 64:
                self.windows.clear()
            a, b, d = (self.beside(name, start, count) for name in ("a", "b", "d"))
            self.windows[key] = (a, b, d)
        return self.windows[key]

    def beside(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """A tensor, or some of its ranks, in the room's storage, where copies see what lies beside it."""
        own = getattr(self, name)
        count = own.shape[0] - start if count is None else count
        span = None if self.room is None else self.room.span(own)
        return own.narrow(0, start, count) if span is None else span.narrow(start, count)

    def extra_repr(self) -> str:
        """How many ranks it holds, the rank in use, its features, and whether it holds nothing."""
        rank = [] if self.rank is None else [f"rank={self.rank.rank}"]
        own = [f"{n}={list(getattr(self, n).shape)}" if n in kronecker.KRONECKER else n for n in self.features]
        return ", ".join([f"max_rank={len(self.d)}", *rank, *own, *(["idle"] if self.idle else [])])

    def _announce(self) -> None:
        """Let :func:`slot_of` find the slot by its tensors."""
        for buffer in self._buffers.values():
            _slots[id(buffer)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = {name: b.tensor(apart=True) if isinstance(b, Span) else b for name, b in state["_buffers"].items()}
        super().__setstate__(
            {"room": None, "kept": None, "lanes": None, "site": "", "reach": None, **state, "_buffers": held}
        )  # type: ignore[no-untyped-call]
        self._announce()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        """What torch does to a module's tensors; the values stay, ``to_empty`` keeps them too.

        Back from the meta device, which has none, a slot holds nothing.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():
            for name, old in before.items():
                new = self._buffers[name]
                assert old is not None
                assert new is not None
                if name in EXACT:
                    new = old if new.device == old.device else torch.empty_like(old, device=new.device)
                    self._buffers[name] = new
                if old.is_meta:
                    new.fill_(NEUTRAL.get(name, 0))
                elif new.data_ptr() != old.data_ptr():
                    new.copy_(old)
        self._announce()
        self.stacks, self.kept = (), None
        if self.room is not None and not any(map(self.room.span, self._buffers.values())):
            self.room = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a pickled view would come back as a tensor of its own, and swaps would write beside the slot; and each
        # tensor would bring the whole room
        held: dict[str, Any] = dict(self._buffers)
        if self.room is not None:
            held = {name: self.room.span(buffer) or buffer for name, buffer in held.items()}
        return {**vars(self), "_buffers": held, "windows": {}, "stacks": (), "kept": None}

    def rewrite(self, carrier: Tensor | None = None, reach: Tensor | None = None) -> Rewrite:
        """The site's rewrite in a graph that holds tensors only; they are its operands, at ``slot.<name>``.

        Args:
            carrier: the tensor whose size is the active rank; ``None``: all ranks are computed.
            reach: ``[rows, tokens]``, which tokens of the program's input the ranks act on; ``None``: all.
        """
        operands: dict[str, Any] = {n: self._buffers[n] for n in ("a", "b", "d", *self.features)}
        if reach is not None:
            operands[REACH[1:]] = reach
        if carrier is not None:
            return Rewrite("slot", slot_of_carrier, {**operands, CARRIER[1:]: carrier}, container="slot")
        return Rewrite("slot", slot, operands, container="slot")

    def live_rewrite(self) -> Rewrite:
        """The site's rewrite in a live module, which holds the slot as ``slot``."""
        operands: dict[str, Any] = {"": self, **{name: self._buffers[name] for name in self.features}}
        function: Callable[..., Tensor] = live_slot_of_all_ranks if self.rank is None else live_slot
        if self.reach is not None:
            function = live_reached
        return Rewrite("slot", function, operands, container="slot")


_slots: WeakValueDictionary[int, Slot] = WeakValueDictionary()


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot that a tensor is a placeholder of, or ``None``."""
    found = _slots.get(id(tensor))  # ids are used again, and ``.to`` replaces tensors
    return found if found is not None and any(b is tensor for b in found._buffers.values()) else None


class Kept(NamedTuple):
    """A slot's ranks in use, for calls that nothing compiles, with what they were found in."""

    carrier: Tensor | None
    tensors: tuple[Tensor, Tensor, Tensor]
    addresses: tuple[int, ...]
    written: int
    ranks: Ranks

    def stands(self, slot: Slot) -> bool:
        """Whether the slot has the same rank, tensors, memory and d still."""
        rank, own, (a, b, d) = slot.rank, slot._buffers, self.tensors
        return (
            (None if rank is None else rank.carrier) is self.carrier
            and own["a"] is a
            and own["b"] is b
            and own["d"] is d
            and version_of(d) == self.written
            and (a.data_ptr(), b.data_ptr(), d.data_ptr()) == self.addresses
        )


@one_node
def in_use(slot: Slot) -> Ranks:
    """A slot's A, B and d, narrowed to the ranks in use, and whether any of these may be off.

    Narrows dimension 0 only: on any other, ``rank == max_rank`` adds a guard. Where nothing is compiled or traced,
    the views are kept: to make them, and to ask d for zeros, takes as long as to multiply with them.
    """
    if torch.compiler.is_compiling() or is_recorded():
        return *_narrowed(slot.a, slot.b, slot.d, slot.rank), True
    kept = slot.kept
    if kept is None or not kept.stands(slot):
        tensors = a, b, d = slot.a, slot.b, slot.d
        if not all(type(t) is Tensor and not t.requires_grad and not t.is_inference() for t in tensors):
            return *_narrowed(*tensors, slot.rank), True  # torch counts no writes there, or wants to see the views
        carrier, written = None if slot.rank is None else slot.rank.carrier, version_of(d)
        with torch.inference_mode(False), torch.no_grad():
            a, b, d = _narrowed(*tensors, slot.rank)
            masked = not d.is_cpu or bool((d == 0).any())  # elsewhere the answer would be waited for
        kept = Kept(carrier, tensors, tuple(map(Tensor.data_ptr, tensors)), written, (a, b, d, masked))
        vars(slot)["kept"] = kept
    return kept.ranks


def _narrowed(a: Tensor, b: Tensor, d: Tensor, rank: ActiveRank | _Carried | None) -> tuple[Tensor, Tensor, Tensor]:
    if rank is None:
        return a, b, d
    r = rank.carrier.size(0)
    return a.narrow(0, 0, r), b.narrow(0, 0, r), d.narrow(0, 0, r)


def live_slot(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, slot: Slot, **gains: Tensor) -> Tensor:
    """The serving subgraph of a live module in dynamic mode, which reads its slot's ranks in one call."""
    return _live(kind, base, x, slot, narrowed=True, **gains)


def live_slot_of_all_ranks(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, slot: Slot, **gains: Tensor
) -> Tensor:
    """The same in static mode."""
    return _live(kind, base, x, slot, narrowed=False, **gains)


def live_reached(kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, slot: Slot, **gains: Tensor) -> Tensor:
    """The same of a slot whose ranks may act on some tokens of a call alone, in either mode."""
    ranks = in_use(slot)
    a, b, d = ranks[0], ranks[1], reached_of(slot, x, ranks[2])
    return _served(kind, base, x, lambda x: kind.update_ranks(x, a, b, d, narrowed=True), **gains)


@one_node
def reached_of(slot: Slot, x: Tensor, d: Tensor) -> Tensor:
    """A slot's scales at the tokens that are reached."""
    assert slot.reach is not None
    return reached(slot.reach, x, d)


def _live(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, slot: Slot, *, narrowed: bool, **gains: Tensor
) -> Tensor:
    ranks = in_use(slot)
    a, b, d, masked = ranks[0], ranks[1], ranks[2], ranks[3]  # on a proxy there is nothing to unpack
    return _served(kind, base, x, lambda x: kind.update_ranks(x, a, b, d, narrowed=narrowed, masked=masked), **gains)


def slot(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, a: Tensor, b: Tensor, d: Tensor,
    rank: ActiveRank | None = None, reach: Tensor | None = None, **gains: Tensor,
) -> Tensor:  # fmt: skip
    """The serving subgraph."""
    a, b, d = _narrowed(a, b, d, rank)
    if reach is not None:
        d = reached(reach, x, d)
    return _served(kind, base, x, lambda x: kind.update_ranks(x, a, b, d, narrowed=rank is not None), **gains)


def _served(
    kind: Kind,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    update: Callable[[Tensor], Tensor],
    *,
    g_in: Tensor | None = None,
    g_out: Tensor | None = None,
    shift: Tensor | None = None,
    rotation: Tensor | None = None,
    w1: Tensor | None = None,
    w2: Tensor | None = None,
) -> Tensor:
    if g_in is not None:
        x = (x * kind.per_input(g_in)).type_as(x)
    if rotation is not None:
        x = rotated(x, rotation, kind.feature_dimension)
    y = base(x)
    out = y + update(x)
    if w1 is not None and w2 is not None:
        out = out + kronecker.product(kind, x, w1, w2)
    if g_out is not None:
        out = out * kind.per_output(g_out)
    if shift is not None:
        out = out + kind.per_output(shift)
    return out.type_as(y)


def slot_of_carrier(
    kind: Kind, base: Callable[[Tensor], Tensor], x: Tensor, *, carrier: Tensor, **operands: Tensor
) -> Tensor:
    """:func:`slot`, the active rank being the size of a tensor that the graph reads itself."""
    return slot(kind, base, x, rank=_Carried(carrier), **operands)  # type: ignore[arg-type]


class _Carried(NamedTuple):
    carrier: Tensor
