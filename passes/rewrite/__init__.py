"""Targets into sites and back: inject, eject and what they take."""
