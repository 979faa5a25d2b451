"""Parameter-efficient fine-tuning as a graph-rewriting compiler pass."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fxpeft.moved import find_old_paths as _find_old_paths

if _TYPE_CHECKING:
    from fxpeft.adapters.allocator import AdaLoraCallback, RankAllocator
    from fxpeft.adapters.api import (
        active_adapters,
        adapter_config,
        adapter_state_dict,
        add_adapter,
        delete_adapter,
        disable_adapters,
        enable_adapters,
        load_adapter,
        loaded_adapters,
        remove,
        save_adapter,
        set_adapter,
        set_scale,
    )
    from fxpeft.adapters.contexts import active, disabled, scaled
    from fxpeft.adapters.eva import initialize_eva
    from fxpeft.adapters.injection import inject, load_adapter_state_dict
    from fxpeft.adapters.parameters import set_requires_grad, trainable_parameters
    from fxpeft.checkpoint.inferred import infer_config
    from fxpeft.errors import AdapterError, CheckpointError, LockError, LockTimeout
    from fxpeft.integrations.transformers.patch import install, installed, uninstall
    from fxpeft.methods import register
    from fxpeft.methods.adalora import AdaLoraConfig
    from fxpeft.methods.ia3 import IA3Config
    from fxpeft.methods.inits import EvaConfig, LoftQConfig
    from fxpeft.methods.lora import LoraConfig
    from fxpeft.methods.p_tuning import PromptEncoderConfig
    from fxpeft.methods.prefix_tuning import PrefixTuningConfig
    from fxpeft.methods.prompt_tuning import PromptTuningConfig
    from fxpeft.model.trace import roles
    from fxpeft.passes.targets.patterns import pattern
    from fxpeft.planning.plan import Plan, apply, plan
    from fxpeft.programs.backend import compile
    from fxpeft.programs.packaged import Package, open_package
    from fxpeft.programs.packaging import package
    from fxpeft.programs.rewrites import Slots
    from fxpeft.programs.rewriting import adapter_inputs, eject, rewrite
    from fxpeft.serving.prepare import hold, hotswap, prepare_hotswap, release_hotswap
    from fxpeft.transform.blend import add_weighted_adapter
    from fxpeft.transform.contexts import folded
    from fxpeft.transform.convert import convert
    from fxpeft.transform.fold import fold, folded_adapters, merge_and_unload, refold, unfold

_find_old_paths()
__version__ = _version("fxpeft")
__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdapterError",
    "CheckpointError",
    "EvaConfig",
    "IA3Config",
    "LockError",
    "LockTimeout",
    "LoftQConfig",
    "LoraConfig",
    "Package",
    "Plan",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RankAllocator",
    "Slots",
    "active",
    "active_adapters",
    "adapter_config",
    "adapter_inputs",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "apply",
    "compile",
    "convert",
    "delete_adapter",
    "disable_adapters",
    "disabled",
    "eject",
    "enable_adapters",
    "fold",
    "folded",
    "folded_adapters",
    "hold",
    "hotswap",
    "infer_config",
    "initialize_eva",
    "inject",
    "install",
    "installed",
    "load_adapter",
    "load_adapter_state_dict",
    "loaded_adapters",
    "merge_and_unload",
    "open_package",
    "package",
    "pattern",
    "plan",
    "prepare_hotswap",
    "refold",
    "register",
    "release_hotswap",
    "remove",
    "rewrite",
    "roles",
    "save_adapter",
    "scaled",
    "set_adapter",
    "set_requires_grad",
    "set_scale",
    "trainable_parameters",
    "unfold",
    "uninstall",
]
_MODULES = {
    **dict.fromkeys(("active", "disabled", "scaled"), "fxpeft.adapters.contexts"),
    "folded": "fxpeft.transform.contexts",
    **dict.fromkeys(("AdapterError", "CheckpointError", "LockError", "LockTimeout"), "fxpeft.errors"),
    **dict.fromkeys(("hold", "hotswap", "prepare_hotswap", "release_hotswap"), "fxpeft.serving.prepare"),
    **dict.fromkeys(("fold", "folded_adapters", "merge_and_unload", "refold", "unfold"), "fxpeft.transform.fold"),
    **dict.fromkeys(("install", "installed", "uninstall"), "fxpeft.integrations.transformers.patch"),
    **dict.fromkeys(("Package", "open_package"), "fxpeft.programs.packaged"),
    "package": "fxpeft.programs.packaging",
    "Slots": "fxpeft.programs.rewrites",
    **dict.fromkeys(("adapter_inputs", "eject", "rewrite"), "fxpeft.programs.rewriting"),
    "compile": "fxpeft.programs.backend",
    **dict.fromkeys(("AdaLoraCallback", "RankAllocator"), "fxpeft.adapters.allocator"),
    "AdaLoraConfig": "fxpeft.methods.adalora",
    "EvaConfig": "fxpeft.methods.inits",
    "IA3Config": "fxpeft.methods.ia3",
    "LoftQConfig": "fxpeft.methods.inits",
    "LoraConfig": "fxpeft.methods.lora",
    "infer_config": "fxpeft.checkpoint.inferred",
    "initialize_eva": "fxpeft.adapters.eva",
    **dict.fromkeys(("inject", "load_adapter_state_dict"), "fxpeft.adapters.injection"),
    "add_weighted_adapter": "fxpeft.transform.blend",
    "convert": "fxpeft.transform.convert",
    "pattern": "fxpeft.passes.targets.patterns",
    "roles": "fxpeft.model.trace",
    **dict.fromkeys(("Plan", "apply", "plan"), "fxpeft.planning.plan"),
    "PrefixTuningConfig": "fxpeft.methods.prefix_tuning",
    "PromptEncoderConfig": "fxpeft.methods.p_tuning",
    "PromptTuningConfig": "fxpeft.methods.prompt_tuning",
    "register": "fxpeft.methods",
    **dict.fromkeys(("set_requires_grad", "trainable_parameters"), "fxpeft.adapters.parameters"),
}


def __getattr__(name: str) -> _Any:
    # on first use: pytest imports this package in every run, for its plugin, and torch takes seconds
    if name not in __all__:
        raise AttributeError(f"module 'fxpeft' has no attribute {name!r}")
    value = getattr(_import_module(_MODULES.get(name, "fxpeft.adapters.api")), name)
    globals()[name] = value
    return value
