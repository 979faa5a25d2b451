"""Module paths of 0.1.0: imports and pickles that name them find the module where it is now, for one minor release."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_KEPT = {  # package -> the modules that went into it by their own name
    "fxpeft.adapters": "allocator calls change embeddings eva injection inplace lock parameters penalty plain state",
    "fxpeft.checkpoint": "adapter_file inferred keys layouts model_card",
    "fxpeft.methods": "config prompt_inputs",
    "fxpeft.model": "fast_path fingerprint reads skeleton trace wrappers",
    "fxpeft.programs": "backend exported packaged packaging",
    "fxpeft.serving": "base_loads guard swap",
    "fxpeft.targets": "attention defaults experts sites",
    "fxpeft.tools": "bench cli",
    "fxpeft.planning": "planner",
    "fxpeft.transform": "blend conversion derived folding task_vectors",
    "fxpeft.integrations.transformers": "loading model_methods model_state saving trainer",
    "fxpeft.passes.targets": "convolution flow globs match names patterns regex roles terms",
    "fxpeft.passes.rewrite": "eject feed inject lift redirect subgraphs",
    "fxpeft.passes.slots": "copies slot stack",
    "fxpeft.passes.live": "locked parameters product",
    "fxpeft.passes.captured": "aten dynamo",
    "fxpeft.passes.backend": "clean fold_inactive group writes",
}
MOVED = {
    **{f"{new.rpartition('.')[0]}.{name}": f"{new}.{name}" for new, names in _KEPT.items() for name in names.split()},
    "fxpeft.adapter_name": "fxpeft.adapters.name",
    "fxpeft.empty_model": "fxpeft.model.empty",
    "fxpeft.plan_picture": "fxpeft.planning.picture",
    "fxpeft.plan_table": "fxpeft.planning.table",
    "fxpeft.program_inputs": "fxpeft.programs.inputs",
    "fxpeft.program_sites": "fxpeft.programs.sites",
    "fxpeft.prompts_serving": "fxpeft.serving.prompts",
    "fxpeft.target_parameters": "fxpeft.targets.parameters",
    "fxpeft.passes.kinds": "fxpeft.passes.targets.operations",
    "fxpeft.passes.live.container": "fxpeft.passes.container",
}


class _Moved(MetaPathFinder, Loader):
    """An old path is a module that passes each question on to the one at the new path."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        text = f"{module.__name__} moved to {new}; the old path works for one more minor release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        there = import_module(new)
        module.__getattr__ = lambda name: getattr(there, name)  # type: ignore[method-assign]


def find_old_paths() -> None:
    """Let old paths be found, after everything that is there."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
