"""Captured programs in the form that the passes read, and the adapters in them in the form that programs have."""

from fxpeft.passes.captured.aten import AtenPass
from fxpeft.passes.captured.dynamo import annotate_sources, name_operands
from fxpeft.passes.captured.form import FormPass

__all__ = ["AtenPass", "FormPass", "annotate_sources", "name_operands"]
