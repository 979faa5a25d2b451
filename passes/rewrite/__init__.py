"""Targets into sites and back: inject, redirect and feed, eject, and the operands on their way into a program."""

from fxpeft.passes.rewrite.eject import EjectPass
from fxpeft.passes.rewrite.feed import Feed, FeedPass
from fxpeft.passes.rewrite.inject import InjectPass, Rewrite
from fxpeft.passes.rewrite.lift import LiftPass
from fxpeft.passes.rewrite.redirect import RedirectPass

__all__ = ["EjectPass", "Feed", "FeedPass", "InjectPass", "LiftPass", "RedirectPass", "Rewrite"]
