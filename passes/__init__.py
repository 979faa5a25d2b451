"""Graph in, graph out: the passes of fxpeft. They know torch.fx and nothing of files or checkpoints."""

from fxpeft.passes.aten import AtenPass
from fxpeft.passes.base import GraphPass, PassError, Report, RewriteResult, Skip
from fxpeft.passes.clean import CleanPass
from fxpeft.passes.eject import EjectPass
from fxpeft.passes.fold_inactive import FoldInactivePass
from fxpeft.passes.inject import InjectPass, Rewrite
from fxpeft.passes.kinds import Conv, Embedding, Kind, Linear
from fxpeft.passes.lift import LiftPass
from fxpeft.passes.match import MatchPass, Target
from fxpeft.passes.names import NameSelector
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.redirect import RedirectPass

__all__ = [
    "AtenPass", "CleanPass", "Conv", "EjectPass", "Embedding", "FoldInactivePass", "GraphPass", "InjectPass", "Kind",
    "LiftPass", "Linear", "MatchPass", "NameSelector", "PassError", "Pipeline", "RedirectPass", "Report", "Rewrite",
    "RewriteResult", "Skip", "Target", "graph_text",
]  # fmt: skip
