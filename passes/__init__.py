"""Graph in, graph out: the passes of fxpeft. They know torch.fx and nothing of files or checkpoints."""

from fxpeft.passes.backend.clean import CleanPass
from fxpeft.passes.backend.fold_inactive import FoldInactivePass
from fxpeft.passes.backend.group import Group, GroupPass
from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip
from fxpeft.passes.captured.aten import AtenPass
from fxpeft.passes.live import forward_text
from fxpeft.passes.live.parameters import ParameterKind, ReadPass
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.rewrite.eject import EjectPass
from fxpeft.passes.rewrite.feed import Feed, FeedPass
from fxpeft.passes.rewrite.inject import InjectPass, Rewrite
from fxpeft.passes.rewrite.lift import LiftPass
from fxpeft.passes.rewrite.redirect import RedirectPass
from fxpeft.passes.targets.kinds import Conv, Embedding, Kind, Linear
from fxpeft.passes.targets.match import MatchPass, Target
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.patterns import layers, pattern, role
from fxpeft.passes.targets.roles import Role, RolePass, declare
from fxpeft.passes.targets.terms import Pattern, PatternError

__all__ = [
    "AtenPass", "CleanPass", "Conv", "EjectPass", "Embedding", "Feed", "FeedPass", "FoldInactivePass", "GraphPass",
    "Group", "GroupPass", "InjectPass", "Kind", "LiftPass", "Linear", "MatchPass", "NameSelector", "ParameterKind",
    "PassError", "Pattern", "PatternError", "Pipeline", "ReadPass", "RedirectPass", "Report", "Rewrite",
    "RewriteResult", "Role", "RolePass", "Skip", "Target", "declare", "forward_text", "graph_text", "layers", "pattern",
    "role",
]  # fmt: skip
