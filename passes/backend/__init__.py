"""What runs between Dynamo's capture and Inductor."""

from fxpeft.passes.backend.backend_pass import BackendPass, Context, SlotTensor
from fxpeft.passes.backend.clean import CleanPass
from fxpeft.passes.backend.fold_inactive import FoldInactivePass
from fxpeft.passes.backend.group import Group, GroupPass

__all__ = ["BackendPass", "CleanPass", "Context", "FoldInactivePass", "Group", "GroupPass", "SlotTensor"]
