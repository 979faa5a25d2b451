"""From a config to the sites it takes: names, patterns, roles, an architecture's defaults."""

from fxpeft.targets.sites import AdapterPlan, make_plan

__all__ = ["AdapterPlan", "make_plan"]
