"""Captured programs in the form that the passes read."""
