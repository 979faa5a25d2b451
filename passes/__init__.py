"""Graph in, graph out: the passes of fxpeft. They know torch.fx and nothing of files or checkpoints."""

from fxpeft.passes.aten import AtenPass
from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip
from fxpeft.passes.clean import CleanPass
from fxpeft.passes.eject import EjectPass
from fxpeft.passes.feed import Feed, FeedPass
from fxpeft.passes.fold_inactive import FoldInactivePass
from fxpeft.passes.inject import InjectPass, Rewrite
from fxpeft.passes.kinds import Conv, Embedding, Kind, Linear
from fxpeft.passes.lift import LiftPass
from fxpeft.passes.match import MatchPass, Target
from fxpeft.passes.names import NameSelector
from fxpeft.passes.parameters import ParameterKind, ReadPass
from fxpeft.passes.patterns import pattern
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.redirect import RedirectPass
from fxpeft.passes.roles import Role, RolePass
from fxpeft.passes.terms import Pattern, PatternError

__all__ = [
    "AtenPass", "CleanPass", "Conv", "EjectPass", "Embedding", "Feed", "FeedPass", "FoldInactivePass", "GraphPass",
    "InjectPass", "Kind", "LiftPass", "Linear", "MatchPass", "NameSelector", "ParameterKind", "PassError", "Pattern",
    "PatternError", "Pipeline", "ReadPass", "RedirectPass", "Report", "Rewrite", "RewriteResult", "Role", "RolePass",
    "Skip", "Target", "graph_text", "pattern",
]  # fmt: skip
