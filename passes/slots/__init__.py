"""The slot, its stack for groups, and the copies that fill it."""

from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.slot import ActiveRank, Slot, slot_of
from fxpeft.passes.slots.stack import Stack

__all__ = ["ActiveRank", "Copies", "Slot", "Stack", "slot_of"]
