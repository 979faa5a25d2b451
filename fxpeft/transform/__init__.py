"""New weights out of adapters: folds, blends, conversions, task vectors."""

from fxpeft.transform.blend import add_weighted_adapter
from fxpeft.transform.contexts import folded
from fxpeft.transform.conversion import convert
from fxpeft.transform.folding import fold, folded_adapters, merge_and_unload, refold, unfold

__all__ = [
    "add_weighted_adapter",
    "convert",
    "fold",
    "folded",
    "folded_adapters",
    "merge_and_unload",
    "refold",
    "unfold",
]
