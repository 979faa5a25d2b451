"""Transformers' own adapter methods, answered by fxpeft."""
