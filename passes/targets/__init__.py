"""What can be adapted: kinds of target, the language that selects them, and the passes that find them in a graph."""

from fxpeft.passes.targets.flow import flow_of
from fxpeft.passes.targets.match import MatchPass, Target
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.operations import (
    OPERATIONS,
    Conv,
    Embedding,
    Kind,
    Linear,
    OpSpec,
    ParameterKind,
    Places,
    register_operation,
)
from fxpeft.passes.targets.patterns import layers, pattern, role
from fxpeft.passes.targets.reading import Unsupported, Weight
from fxpeft.passes.targets.roles import Role, RolePass, declare
from fxpeft.passes.targets.terms import Pattern, PatternError, Subject

__all__ = [
    "OPERATIONS", "Conv", "Embedding", "Kind", "Linear", "MatchPass", "NameSelector", "OpSpec", "ParameterKind",
    "Pattern", "PatternError", "Places", "Role", "RolePass", "Subject", "Target", "Unsupported", "Weight", "declare",
    "flow_of", "layers", "pattern", "register_operation", "role",
]  # fmt: skip
