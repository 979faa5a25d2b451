"""Reading a model: its modules and tensors, its traces and roles, its skeleton without weights."""

from fxpeft.model.trace import roles

__all__ = ["roles"]
