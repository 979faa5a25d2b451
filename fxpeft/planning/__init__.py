"""What an adapter would do to a model, before it is done: as data, as a table, as a picture."""

from fxpeft.planning.planner import Plan, apply, plan

__all__ = ["Plan", "apply", "plan"]
