"""A stack is what its slots hold, whoever wrote them last, and it goes when the slots' tensors do."""

from __future__ import annotations

from tiny import randomise
from torch import Tensor

from fxpeft.passes import Linear
from fxpeft.passes.slots.slot import ActiveRank, Slot
from fxpeft.passes.slots.stack import Stack, stack_of


def slots(rank: ActiveRank | None, count: int = 3) -> list[Slot]:
    made = [Slot(Linear(6, 5), 8, rank) for _ in range(count)]
    for seed, one in enumerate(made):
        randomise([one.a], seed)
    return made


def holds(stack: Tensor, sources: list[Tensor], rank: int) -> bool:
    return stack.shape == (8, len(sources), 6) and all(
        bool((stack[:rank, i] == source[:rank]).all()) for i, source in enumerate(sources)
    )


def test_it_follows_the_slots() -> None:
    rank = ActiveRank(8)
    rank.set(3)
    sources = [one.a for one in slots(rank)]
    stack = Stack(sources, rank)
    assert holds(stack.refreshed(), sources, 3)
    sources[1].fill_(2.5)
    assert holds(stack.refreshed(), sources, 3)
    rank.set(7)  # more ranks of the same adapter
    assert holds(stack.refreshed(), sources, 7)


def test_what_nobody_wrote_is_not_copied_again() -> None:
    stack = Stack([one.a for one in slots(None)], None)
    stack.refreshed()
    stack.tensor.fill_(7.0)
    assert bool((stack.refreshed() == 7.0).all())


def test_one_of_the_same_slots_is_found_again() -> None:
    made = slots(None)
    sources, known = [one.a for one in made], dict[int, Stack]()
    first = stack_of(sources, known)
    assert stack_of(sources, known) is first
    assert stack_of(sources, {}) is first  # another graph's: the slot keeps it
    assert stack_of(sources[::-1], {}) is not first
    assert holds(stack_of(sources[::-1], {}), sources[::-1], 8)
    assert len(made[0].stacks) == 1
    assert len(made[2].stacks) == 1


def test_a_stack_of_tensors_that_are_gone_is_dropped() -> None:
    made = slots(None)
    stack_of([one.a for one in made], {})
    made[1].to("meta").to_empty(device="cpu")
    randomise([made[1].a], 9)
    sources = [one.a for one in made]
    assert holds(stack_of(sources, {}), sources, 8)
    assert len(made[0].stacks) == 1


def test_tensors_that_no_slot_has_are_stacked_each_time() -> None:
    sources, known = [one.a.clone() for one in slots(None)], dict[int, Stack]()
    first = stack_of(sources, known)
    assert holds(first, sources, 8)
    assert stack_of(sources, known) is not first
    assert not known
