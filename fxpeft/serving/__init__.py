"""Static slots, prepared once, and the swaps that write them; rows of their own adapters, and a store of many."""

from fxpeft.serving import call_scale as _call_scale  # noqa: F401 - what calls that ask for a scale need
from fxpeft.serving.api import hold, hotswap
from fxpeft.serving.prepare import prepare_hotswap
from fxpeft.serving.release import release_hotswap, remove
from fxpeft.serving.rows import rows, tokens
from fxpeft.serving.store import AdapterStore

__all__ = ["AdapterStore", "hold", "hotswap", "prepare_hotswap", "release_hotswap", "remove", "rows", "tokens"]
