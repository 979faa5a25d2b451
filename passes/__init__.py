"""Graph in, graph out: the passes of fxpeft. They know torch.fx and nothing of files or checkpoints."""

from fxpeft.passes.backend import (
    BackendPass,
    CleanPass,
    Context,
    FoldInactivePass,
    Group,
    GroupPass,
    SlotTensor,
)
from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip
from fxpeft.passes.captured import AtenPass, FormPass
from fxpeft.passes.live import ReadPass, forward_text
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.rewrite import EjectPass, Feed, FeedPass, InjectPass, LiftPass, RedirectPass, Rewrite
from fxpeft.passes.targets import (
    OPERATIONS,
    Conv,
    Embedding,
    Kind,
    Linear,
    MatchPass,
    NameSelector,
    OpSpec,
    ParameterKind,
    Pattern,
    PatternError,
    Places,
    Role,
    RolePass,
    Target,
    Unsupported,
    Weight,
    declare,
    layers,
    pattern,
    register_operation,
    role,
)

__all__ = [
    "OPERATIONS", "AtenPass", "BackendPass", "CleanPass", "Context", "Conv", "EjectPass", "Embedding", "Feed",
    "FeedPass", "FoldInactivePass", "FormPass", "GraphPass", "Group", "GroupPass", "InjectPass", "Kind", "LiftPass",
    "Linear", "MatchPass", "NameSelector", "OpSpec", "ParameterKind", "PassError", "Pattern", "PatternError",
    "Pipeline", "Places", "ReadPass", "RedirectPass", "Report", "Rewrite", "RewriteResult", "Role", "RolePass",
    "Skip", "SlotTensor", "Target", "Unsupported", "Weight", "declare", "forward_text", "graph_text", "layers",
    "pattern", "register_operation", "role",
]  # fmt: skip
