"""Graph in, graph out: the passes of fxpeft. They know torch.fx and nothing of files or checkpoints."""

from fxpeft.passes.backend import CleanPass, FoldInactivePass, Group, GroupPass
from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip
from fxpeft.passes.captured import AtenPass
from fxpeft.passes.live import ParameterKind, ReadPass, forward_text
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.rewrite import EjectPass, Feed, FeedPass, InjectPass, LiftPass, RedirectPass, Rewrite
from fxpeft.passes.targets import (
    Conv,
    Embedding,
    Kind,
    Linear,
    MatchPass,
    NameSelector,
    Pattern,
    PatternError,
    Role,
    RolePass,
    Target,
    declare,
    layers,
    pattern,
    role,
)

__all__ = [
    "AtenPass", "CleanPass", "Conv", "EjectPass", "Embedding", "Feed", "FeedPass", "FoldInactivePass", "GraphPass",
    "Group", "GroupPass", "InjectPass", "Kind", "LiftPass", "Linear", "MatchPass", "NameSelector", "ParameterKind",
    "PassError", "Pattern", "PatternError", "Pipeline", "ReadPass", "RedirectPass", "Report", "Rewrite",
    "RewriteResult", "Role", "RolePass", "Skip", "Target", "declare", "forward_text", "graph_text", "layers", "pattern",
    "role",
]  # fmt: skip
